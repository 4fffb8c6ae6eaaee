#!/bin/bash
# Stages 4, 5, the encoder in a VLM: sbatch [--nodes N ...] slurm/vlm.sh [--recipe R] [--run RUN] [--set KEY=VALUE ...]
# A job does the first of the two that is not done: submit it again after it, in the clone's folder. Defaults are in env.sh.
#SBATCH --job-name=hive-vlm
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --wait-all-nodes=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@600
#SBATCH --output=%x-%j.log
set -uo pipefail
source "${HIVE_DS:-${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}}/slurm/body.sh" || exit 2
parse "$@"
stage=4
if [ -e "$run/stage4/DONE" ]; then stage=5; fi
run_stage "$stage" "$@"
