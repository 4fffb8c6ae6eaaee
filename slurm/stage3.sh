#!/bin/bash
# Stage 3, vision fine-tuning: sbatch [--nodes N ...] slurm/stage3.sh [--recipe R] [--run RUN] [--set KEY=VALUE ...]
# Submit it in the clone's folder. Defaults are in env.sh.
#SBATCH --job-name=hive-stage3
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
run_stage 3 "$@"
