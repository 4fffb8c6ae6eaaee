#!/bin/bash
# Write the trained vision encoder as a stock Hugging Face folder: sbatch slurm/export.sh [RUN] [OUT] [OPTION...]
# RUN is env.sh's by default, and OUT is RUN/encoder. Options are those of hive-ds export encoder, as --tail cut.
#SBATCH --job-name=hive-export
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -uo pipefail
source "${HIVE_DS:-${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}}/slurm/body.sh" || exit 2
run=$(absolute "${1:-$HIVE_RUN}")
out=$(absolute "${2:-$run/encoder}")
if [ -e "$out/config.json" ]; then
    say "$out is there already"
    exit 0
fi
run_once export encoder "$run" "$out" "${@:3}"
