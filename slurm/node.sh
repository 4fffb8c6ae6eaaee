#!/bin/bash
# One node of a stage's job: srun starts it once a node, in the container where there is one. Arguments: the trainer's.
set -uo pipefail

# A folder for this attempt alone: data loaders of two jobs on a node must not meet, and what a killed attempt left goes.
rm -rf "$HIVE_SCRATCH/hive-$SLURM_JOB_ID".*
export TMPDIR=$HIVE_SCRATCH/hive-$HIVE_ATTEMPT
mkdir -p "$TMPDIR" || exit 1
# Compiled kernels outlive the job, but never leave the node: on shared disks processes trip over one another.
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$HIVE_SCRATCH/hive-$(id -un)/triton}
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$HIVE_SCRATCH/hive-$(id -un)/inductor}
export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$HIVE_SCRATCH/hive-$(id -un)/extensions}

"$HIVE_PYTHON" -m hive_ds.launch.node --nodes "$SLURM_STEP_NUM_NODES" --node-rank "$SLURM_NODEID" --ranks "$HIVE_RANKS" \
    --master "$HIVE_MASTER" --port "$HIVE_PORT" --packages "$HIVE_LOGS/packages" -- "$@"
code=$?
echo "$code" >"$HIVE_LOGS/$SLURMD_NODENAME.code" # srun's exit code is the highest of all nodes, 143 of those it ended
rm -rf "$TMPDIR"
exit "$code"
