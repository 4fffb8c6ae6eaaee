# shellcheck shell=bash disable=SC2034
# Everything that belongs to your site. Read the lines marked EDIT; nothing else in this folder needs changing.
#
# Every job sources this file on its first node, and passes its variables to all nodes. Variables that sbatch reads
# (SBATCH_*) must be set when a job is submitted: pipeline.sh sources this file itself; before a plain
# `sbatch slurm/stage1.sh` type `source slurm/env.sh`. Keep passwords and tokens out of it: git sees it.

# EDIT: what your site wants of every job. Options on sbatch's command line win over these.
# export SBATCH_ACCOUNT=my_project
# export SBATCH_PARTITION=gpu
# export SBATCH_QOS=normal
# export SBATCH_TIMELIMIT=24:00:00

# EDIT: GPUs a node, if your site wants them asked for. Without this line a job gets all GPUs of its nodes, for it asks
# for whole nodes.
# export SBATCH_GPUS_PER_NODE=8

# EDIT: more sbatch options of pipeline.sh's jobs, of those that train or score and of those that need no GPU (convert,
# export). For example (--constraint=a100 --mail-type=FAIL) and (--partition=cpu --cpus-per-task=16).
HIVE_GPU_JOB=()
HIVE_CPU_JOB=()

# EDIT: modules.
# module load cuda

# EDIT: the Python that hive-ds is installed in, at the same path on every node; `make venv` makes this one.
HIVE_PYTHON=$HIVE_CLONE/.venv/bin/python

# EDIT: more options of srun. A container with pyxis, for example:
# HIVE_SRUN=(--container-image=/images/hive-ds.sqsh --container-mounts=/data,/scratch)
HIVE_SRUN=()

# EDIT: ranks a node where nodes have no GPUs.
HIVE_CPU_RANKS=2

# EDIT: node-local folder for temporary files and compiled kernels.
HIVE_SCRATCH=/tmp

# EDIT: the network interface ranks talk through, if the one with the route to the first node is wrong.
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0

# EDIT: nodes without internet read models from the cache alone.
# export HF_HOME=/shared/huggingface HF_HUB_OFFLINE=1

# EDIT: defaults of --recipe and --run.
HIVE_RECIPE=tiny
HIVE_RUN=runs/tiny

# EDIT: what convert.sh converts, if pipeline.sh shall do that first: source, new folder, options of
# `hive-ds data convert`. For example (/data/llava.json /data/llava-mds --images /data/images).
HIVE_CONVERT=()

# EDIT: what eval.sh scores, if pipeline.sh shall do that last: benchmarks, the folder of their data, options of
# `hive-ds eval`. For example (mme,gqa,pope /data/benchmarks --dtype bfloat16 --batch-size 64).
HIVE_EVAL=()

# EDIT: stages of the chain, where the login node does not have HIVE_PYTHON, which knows them from the recipe.
HIVE_STAGES='1 2 3'

# Before training, every node of a job is tried: 0 switches that off. A node that has not answered after so many seconds
# is taken for a bad one.
HIVE_PREFLIGHT=1
HIVE_PREFLIGHT_PATIENCE=300

# How often a job may start again, for whatever reason, and how often in a row after failures without a new checkpoint.
HIVE_MAX_RESTARTS=100
HIVE_MAX_FAILURES=3
