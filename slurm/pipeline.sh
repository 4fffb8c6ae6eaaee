#!/bin/bash
# Submit the whole chain: slurm/pipeline.sh [--nodes N] [--spares N] [--recipe R] [--run RUN] [--set KEY=VALUE ...]
#
# convert (if env.sh says what) -> stages 1, 2, 3 -> export -> stages 4, 5 (vlm.sh), those that the recipe describes -> eval
# (if env.sh says what), each after the one before it has succeeded. Called again, it submits only what is neither done
# nor queued: after a failure, mend the cause and call it again.
set -uo pipefail
# shellcheck source-path=SCRIPTDIR source=body.sh
source "$(dirname "${BASH_SOURCE[0]}")/body.sh" || exit 2

node_count=1 arguments=()
while [ $# -gt 0 ]; do
    if [ "$1" = --nodes ]; then
        [ $# -ge 2 ] || fail "--nodes needs a value"
        node_count=$2 && shift 2
    else
        arguments+=("$1") && shift
    fi
done
parse ${arguments[@]+"${arguments[@]}"}
export HIVE_DS=$HIVE_CLONE
case ${SBATCH_EXPORT:-ALL} in # of a site that keeps the environment from jobs: called from another folder, they need this
ALL*) ;;
NONE | NIL) export SBATCH_EXPORT=HIVE_DS ;;
*) export SBATCH_EXPORT=$SBATCH_EXPORT,HIVE_DS ;;
esac
previous=''

submit() { # NAME FILE-THAT-SAYS-DONE SBATCH-ARGUMENT...; leaves_out is a variable that sbatch is not to see
    local name=$1 done_file=$2 job
    shift 2
    if [ -e "$done_file" ]; then
        echo "$name: done already"
        return
    fi
    # The comment tells the jobs of one run folder from those of others.
    job=$(squeue --noheader --me --name "hive-$name" --format '%i %k' |
        awk -v run="$run" 'substr($0, index($0, " ") + 1) == run { print $1; exit }')
    if [ -n "$job" ]; then
        echo "$name: job $job is queued or running"
    else
        job=$(env -u "${leaves_out:-_}" sbatch --parsable --kill-on-invalid-dep=yes --comment "$run" --job-name "hive-$name" \
            --output "${run//%/%%}/logs/%x-%j.log" ${previous:+--dependency "afterok:$previous"} "$@") || exit 1
        job=${job%%;*} # a federation adds ;CLUSTER
        echo "$name: job $job${previous:+, after $previous}"
    fi
    previous=$job
}

described=$HIVE_STAGES
if command -v "$HIVE_PYTHON" >/dev/null; then
    described=$("$HIVE_PYTHON" -m hive_ds.launch.stages "$recipe" ${options[@]+"${options[@]}"}) || exit 2
fi
[ ${#HIVE_CONVERT[@]} -ne 1 ] || fail "HIVE_CONVERT in env.sh is (${HIVE_CONVERT[*]}); expected (SOURCE OUT OPTION...)"
[ ${#HIVE_EVAL[@]} -ne 1 ] || fail "HIVE_EVAL in env.sh is (${HIVE_EVAL[*]}); expected (BENCHMARKS DATA OPTION...)"
mkdir -p "$run/logs" || fail "cannot write $run; change --run"
if [ ${#HIVE_CONVERT[@]} -gt 0 ]; then
    leaves_out=SBATCH_GPUS_PER_NODE submit convert "${HIVE_CONVERT[1]}/index.json" ${HIVE_CPU_JOB[@]+"${HIVE_CPU_JOB[@]}"} "$slurm_folder/convert.sh"
fi
trains_encoder=''
for stage in $described; do
    if [ "$stage" -le 3 ]; then
        trains_encoder=1
        submit "stage$stage" "$run/stage$stage/DONE" --nodes "$node_count" ${HIVE_GPU_JOB[@]+"${HIVE_GPU_JOB[@]}"} \
            "$slurm_folder/stage$stage.sh" ${arguments[@]+"${arguments[@]}"}
    fi
done
if [ -n "$trains_encoder" ]; then
    leaves_out=SBATCH_GPUS_PER_NODE submit export "$run/encoder/config.json" ${HIVE_CPU_JOB[@]+"${HIVE_CPU_JOB[@]}"} "$slurm_folder/export.sh" "$run"
fi
for stage in $described; do
    if [ "$stage" -ge 4 ]; then
        submit "stage$stage" "$run/stage$stage/DONE" --nodes "$node_count" ${HIVE_GPU_JOB[@]+"${HIVE_GPU_JOB[@]}"} \
            "$slurm_folder/vlm.sh" ${arguments[@]+"${arguments[@]}"}
    fi
done
if [ ${#HIVE_EVAL[@]} -gt 0 ]; then
    submit eval "$run/eval/results.json" ${HIVE_GPU_JOB[@]+"${HIVE_GPU_JOB[@]}"} "$slurm_folder/eval.sh" "$run"
fi
