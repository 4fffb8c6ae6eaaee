#!/bin/bash
# Score a trained model on benchmarks: sbatch slurm/eval.sh [RUN] [OUT] [options of hive-ds eval]
# RUN is env.sh's by default, OUT is RUN/eval, and HIVE_EVAL in env.sh says which benchmarks. Uses the GPUs of one node.
#SBATCH --job-name=hive-eval
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -uo pipefail
source "${HIVE_DS:-${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}}/slurm/body.sh" || exit 2
run=$(absolute "${1:-$HIVE_RUN}")
out=$(absolute "${2:-$run/eval}")
[ ${#HIVE_EVAL[@]} -ge 2 ] || fail "eval.sh needs HIVE_EVAL in env.sh: benchmarks and the folder of their data"
if [ -e "$out/results.json" ]; then
    say "$out/results.json is there already"
    exit 0
fi
gpus=${SLURM_GPUS_ON_NODE:-0} ask_gpus=()
if [ "$gpus" -gt 0 ]; then ask_gpus=(--gpus-per-node "$gpus"); else gpus=$HIVE_CPU_RANKS; fi
srun --nodes 1 --ntasks 1 --cpus-per-task "$(cpus_of_a_task)" \
    ${ask_gpus[@]+"${ask_gpus[@]}"} ${HIVE_SRUN[@]+"${HIVE_SRUN[@]}"} \
    "$HIVE_PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$gpus" -m hive_ds \
    eval "$run" --tasks "${HIVE_EVAL[0]}" --data "${HIVE_EVAL[1]}" --out "$out" "${HIVE_EVAL[@]:2}" "${@:3}"
