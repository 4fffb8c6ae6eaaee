#!/bin/bash
# Convert a data set: sbatch [--cpus-per-task N] slurm/convert.sh SOURCE OUT [options of hive-ds data convert]
# Stopped or killed, the same command goes on where it was. Without arguments it takes those of HIVE_CONVERT in env.sh.
#SBATCH --job-name=hive-convert
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -uo pipefail
source "${HIVE_DS:-${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}}/slurm/body.sh" || exit 2
[ $# -gt 0 ] || set -- ${HIVE_CONVERT[@]+"${HIVE_CONVERT[@]}"}
[ $# -ge 2 ] || fail "convert.sh needs a source and an output folder, or HIVE_CONVERT in env.sh"
if [ -e "$2/index.json" ]; then
    say "$2 is converted already"
    exit 0
fi
run_once data convert "$@"
