# shellcheck shell=bash
# What the job scripts of this folder share; they source it on the first node of their job.
#
# A stage's job: one srun task a node (node.sh), torchrun's ranks below it. How the job goes on is decided by files, not
# by exit codes alone: RUN/stageN/DONE is success, whatever srun says; RUN/stageN/STOP asks the trainer to save and stop.

say() { echo "$(date '+%F %T') $*"; }

fail() { # wrong input: the job ends, and nothing starts it again
    echo "error: $*" >&2
    exit 2
}

case " $* " in
*" --help "* | *" -h "*) # the comment at the head of the script that sources this
    sed -n '2,${/^#/!q; /^#SBATCH/d; s/^# \{0,1\}//p}' "${BASH_SOURCE[1]}"
    exit 0
    ;;
esac
script=slurm/$(basename "${BASH_SOURCE[1]}")
if [ "$script" != slurm/pipeline.sh ] && [ -z "${SLURM_JOB_ID:-}" ]; then
    fail "$script runs as a job; submit it in the clone's folder: sbatch $script (bash $script --help says more)"
fi

slurm_folder=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
HIVE_CLONE=$(dirname "$slurm_folder")
export HIVE_CLONE
set +u # `module load` often reads variables that are not set
# shellcheck source=slurm/env.sh
source "$slurm_folder/env.sh"
# shellcheck source=slurm/preflight.sh
source "$slurm_folder/preflight.sh"
set -u
export HIVE_PYTHON HIVE_SCRATCH
export SLURM_EXPORT_ENV=ALL # sbatch --export=NONE, which some sites set, would keep srun from passing all this on

absolute() { realpath -ms -- "$1"; } # also without a slash at the end, which would make another run of it for pipeline.sh

parse() { # sets recipe, run, spares, and the options that the trainer gets as they are
    recipe=$HIVE_RECIPE run=$HIVE_RUN spares=0 options=()
    while [ $# -gt 0 ]; do
        case $1 in
        --recipe | --run | --spares | --set) [ -n "${2:-}" ] || fail "$1 needs a value" ;;
        esac
        case $1 in
        --recipe) recipe=$2 && shift 2 ;;
        --run) run=$2 && shift 2 ;;
        --spares) spares=$2 && shift 2 ;;
        --set) options+=("$1" "$2") && shift 2 ;;
        --debug) options+=("$1") && shift ;;
        *)
            fail "unknown argument $1; expected --recipe R, --run RUN, --spares N, --set KEY=VALUE or --debug;" \
                "sbatch's own go before the script's name, or as SBATCH_... into env.sh"
            ;;
        esac
    done
    [[ $spares =~ ^(0|[1-9][0-9]*)$ ]] || fail "--spares is $spares; expected how many of the job's nodes are spare"
    run=$(absolute "$run")
    if [ -f "$recipe" ]; then recipe=$(absolute "$recipe"); fi
}

run_stage() { # NUMBER ARGUMENTS: a job's whole life
    local number=$1
    shift
    parse "$@"
    folder=$run/stage$number
    if [ -e "$folder/DONE" ]; then
        say "stage $number of $run is done already"
        exit 0
    fi
    restarts=${SLURM_RESTART_COUNT:-0}
    time_is_up='' trainer=''
    rm -f "$folder/STOP" # of the attempt before; what comes from here on is for this one
    trap on_time_is_up USR1
    # The trainer writes it to RUN/stageN/attempt, and writes nothing more once another attempt's stands there.
    export HIVE_ATTEMPT=$SLURM_JOB_ID.$restarts
    logs=$folder/attempts/$HIVE_ATTEMPT
    mkdir -p "$logs" || fail "cannot write $logs; change --run"
    set_stop_time
    snapshot "$@"
    say "stage $number of $run, attempt $HIVE_ATTEMPT on $SLURM_JOB_NODELIST; ranks log to $logs"
    set_up_steps
    choose_nodes
    run_trainer "$number"
    conclude
}

on_time_is_up() { # Slurm sends USR1 before the time limit and, where so set up, before a preemption
    say "Slurm wants the nodes back: asking the trainer to save and stop"
    time_is_up=1
    touch "$folder/STOP"
    [ -n "$trainer" ] || return
    # A trainer that hangs would hold the job until Slurm ends it for good; the newest checkpoint is good to go on from.
    (sleep "${HIVE_STOP_PATIENCE:-480}" && say "no answer: ending the trainer" && kill "$trainer") 2>/dev/null &
}

set_stop_time() { # the trainer stops by itself if the signal does not come (sites switch it off)
    local end now
    end=$(date --date "$(squeue --noheader --jobs "$SLURM_JOB_ID" --format %e)" +%s 2>/dev/null) || return 0
    now=$(date +%s)
    if [ $((end - now)) -gt 1800 ]; then export HIVE_STOP_AT=$((end - 540)); fi
}

snapshot() { # what this attempt ran: arguments, recipe, code and environment, beside its logs
    printf '%q ' "$recipe" "$@" >"$logs/arguments"
    if [ -f "$recipe" ]; then cp "$recipe" "$logs/recipe.yaml"; fi
    git -C "$HIVE_CLONE" rev-parse HEAD >"$logs/commit" 2>/dev/null
    git -C "$HIVE_CLONE" diff HEAD >"$logs/changes.diff" 2>/dev/null
    # By name, and nothing that smells of a secret: run folders are shared.
    env | grep -E '^(SLURM|HIVE|NCCL|GLOO|CUDA|TORCH|TRITON|OMP|HF|PYTHON|DS)_?[A-Z0-9_]*=' |
        grep -viE '^[^=]*(token|secret|passw|credential|_key)' | sort >"$logs/environment"
}

set_up_steps() { # what all sruns of this attempt share
    local gpus=${SLURM_GPUS_ON_NODE:-0}
    unset SLURM_GPUS # of sbatch --gpus: the job's sum, which srun would ask for on fewer nodes
    ask_gpus=()
    export HIVE_RANKS=$gpus HIVE_LOGS=$logs
    if [ "$gpus" -gt 0 ]; then ask_gpus=(--gpus-per-node "$gpus"); else HIVE_RANKS=$HIVE_CPU_RANKS; fi
    # srun does not take over the job's CPUs by itself: ranks would share one core.
    SRUN_CPUS_PER_TASK=$(cpus_of_a_task)
    export SRUN_CPUS_PER_TASK
    # Below the ports that the kernel hands out (32768), and another one for each attempt.
    export HIVE_PORT=$((12000 + (SLURM_JOB_ID * 13 + restarts) % 20000))
}

cpus_of_a_task() { # prints what was asked for, or else all that the smallest of the job's nodes has: srun asks each for it
    # A job that is submitted from within another has a 1 here that nobody asked for.
    if [ "${SLURM_CPUS_PER_TASK:-1}" -gt 1 ]; then
        echo "$SLURM_CPUS_PER_TASK"
    else
        tr , '\n' <<<"$SLURM_JOB_CPUS_PER_NODE" | sort -n | sed 's/(.*//; q' # as 128(x3),64
    fi
}

run_trainer() { # STAGE: returns when all ranks of all nodes have ended
    [ -z "$time_is_up" ] || requeue "time is up"
    export HIVE_MASTER=${nodes[0]}
    srun --nodes "${#nodes[@]}" --ntasks "${#nodes[@]}" --ntasks-per-node 1 --nodelist "$(joined "${nodes[@]}")" \
        --kill-on-bad-exit=1 --output "${logs//%/%%}/%N.log" \
        ${ask_gpus[@]+"${ask_gpus[@]}"} ${HIVE_SRUN[@]+"${HIVE_SRUN[@]}"} \
        bash "$slurm_folder/node.sh" \
        --recipe "$recipe" --stage "$1" --run-folder "$run" ${options[@]+"${options[@]}"} &
    trainer=$!
    while kill -0 "$trainer" 2>/dev/null; do wait "$trainer"; done # a signal ends `wait`, not srun
}

conclude() { # ends the script
    ls "$folder" >/dev/null # makes a network file system look again
    if [ -e "$folder/DONE" ]; then
        say "done"
        exit 0
    fi
    if node_ended_with 126 || node_ended_with 127 || { node_ended_with 2 && ! went_on; }; then # no Python, wrong input
        show_errors
        exit 2
    fi
    if [ -n "$time_is_up" ] || { node_ended_with 85 && [ "$(date +%s)" -ge "${HIVE_STOP_AT:-9999999999}" ]; }; then
        requeue "time is up"
    fi
    if node_ended_with 85; then
        say "stopped by the file STOP; submit the job again to go on"
        exit 85
    fi
    show_errors
    count_failure
    requeue "failed"
}

went_on() { [ "$restarts" -gt 0 ] && [ -e "$folder/latest" ]; } # then the input was right: a disk or a server failed

count_failure() { # ends the script where this was one too many without a new checkpoint
    # `latest` has no end of line; a line a failure is what is counted.
    printf '%s\n' "$(cat "$folder/latest" 2>/dev/null || echo none)" >>"$folder/attempts/failures"
    if [ "$(tail -n "$HIVE_MAX_FAILURES" "$folder/attempts/failures" | uniq -c | awk 'END { print $1 }')" \
        -ge "$HIVE_MAX_FAILURES" ]; then
        : >"$folder/attempts/failures" # whoever submits it again has mended something
        say "failed $HIVE_MAX_FAILURES times without a new checkpoint: giving up"
        exit 1
    fi
}

node_ended_with() { grep -qx "$1" "$logs"/*.code 2>/dev/null; }

show_errors() { # what a reader of the job's log needs most; the whole is in the nodes' logs
    say "the stage is not done; exit codes by node:"
    (cd "$logs" && grep -H . ./*.code 2>/dev/null)
    grep -hE '^(error|hang: |[A-Za-z.]*Error|rank [0-9]+ was the first)' "$logs"/*.log 2>/dev/null | head -n 20
    say "more in $logs/*.log"
}

requeue() { # WHY [NODES]: start this job again, later, on whatever nodes are good then, but not on NODES
    if [ "$restarts" -ge "$HIVE_MAX_RESTARTS" ]; then
        say "$1, and no restart is left (HIVE_MAX_RESTARTS=$HIVE_MAX_RESTARTS); submit the job again to go on"
        exit 1
    fi
    say "$1: requeueing the job${2:+, without $2}"
    if [ -n "${2:-}" ]; then trap '' TERM; fi # Slurm ends this script, which then has something left to do
    scontrol requeue "$SLURM_JOB_ID" || exit 1
    if [ -n "${2:-}" ]; then avoid "$2"; fi
    sleep 300 # Slurm ends this script; ending by itself could be taken for the job's end
    exit 1
}

avoid() { # NODES: besides those that this job avoids already; Slurm takes that from waiting jobs alone
    local before
    before=$(squeue --noheader --jobs "$SLURM_JOB_ID" --format %x)
    scontrol update "JobId=$SLURM_JOB_ID" "ExcNodeList=${before:+$before,}$1" ||
        say "Slurm did not exclude $1; submit the job again with --exclude $1"
}

run_once() { # SUBCOMMAND...: a command of hive-ds on one node
    srun --nodes 1 --ntasks 1 --cpus-per-task "$(cpus_of_a_task)" \
        ${HIVE_SRUN[@]+"${HIVE_SRUN[@]}"} \
        "$HIVE_PYTHON" -m hive_ds "$@"
}
