# shellcheck shell=bash disable=SC2154 # body.sh sets them
# Which of the job's nodes to train on: body.sh sources this.
#
# A check of a few seconds on all nodes, first each by itself, then the network between them. What a node says, or that it
# says nothing, is in RUN/stageN/attempts/JOB.RESTART/preflight: NODE.json, NODE.log, and NODE.fault for one that is unfit.

choose_nodes() { # sets nodes: as many good ones as the job needs, or ends the script
    mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    all=("${nodes[@]}") needed=$((${#nodes[@]} - spares)) checks=$logs/preflight
    [ "$needed" -ge 1 ] || fail "--spares $spares of ${#nodes[@]} nodes leaves none to train on"
    if [ "$HIVE_PREFLIGHT" = 1 ]; then
        local started=$SECONDS
        mkdir -p "$checks" || fail "cannot write $checks"
        try_nodes
        [ -n "$time_is_up" ] || try_network
        [ -z "$time_is_up" ] || requeue "time is up" # and what was found may be half of it
        say "preflight: ${#nodes[@]} of ${#all[@]} nodes are good, $needed needed, $((SECONDS - started)) s" \
            "$(grep -h '^all-reduce' "$checks/network" 2>/dev/null)"
        for fault in "$checks"/*.fault; do
            if [ -e "$fault" ]; then sed "s|^|$(basename "$fault" .fault): |" "$fault"; fi
        done
        if [ -e "$checks/together" ]; then # no fault of one node, and it may be gone next time
            say "$(cat "$checks/together")"
            count_failure
            requeue "the nodes do not work together"
        fi
        if [ ${#nodes[@]} -lt "$needed" ]; then too_few; fi
    fi
    nodes=("${nodes[@]:0:needed}")
}

on_nodes() { # NODE... -- ARGUMENTS: a part of the preflight, one process a node
    local on=()
    while [ "$1" != -- ]; do on+=("$1") && shift; done
    shift
    # shellcheck disable=SC2016 # the node's own shell fills them in
    timeout --kill-after 10 "$HIVE_PREFLIGHT_PATIENCE" \
        srun --nodes ${#on[@]} --ntasks ${#on[@]} --ntasks-per-node 1 --nodelist "$(joined "${on[@]}")" --overlap \
        --open-mode append --output "${checks//%/%%}/%N.log" ${ask_gpus[@]+"${ask_gpus[@]}"} ${HIVE_SRUN[@]+"${HIVE_SRUN[@]}"} \
        bash -c '"$HIVE_PYTHON" -m hive_ds.launch.preflight "$@"; echo $? >"$0/$SLURMD_NODENAME.code"' "$checks" "$@" \
        >>"$checks/srun.log" 2>&1
}

try_nodes() {
    local node again retries=()
    try_each "${nodes[@]}"
    # A step that cannot start on one node is ended on all: the rest may have had no time.
    for node in $(silent); do try_each "$node" & retries+=("$!"); done
    for again in ${retries[@]+"${retries[@]}"}; do wait "$again"; done # a bare `wait` waits for more than these
    for node in $(silent); do note_fault "$node" "did not finish its check: $(last_words "$node")"; done
    keep_good
}

try_each() { # NODE...
    on_nodes "$@" -- node --ranks "$HIVE_RANKS" --gpus "${SLURM_GPUS_ON_NODE:-0}" \
        --scratch "$HIVE_SCRATCH" --run "$folder" --out "$checks"
}

silent() { # prints the nodes that have not said anything
    local node
    for node in "${nodes[@]}"; do
        [ -e "$checks/$node.json" ] || echo "$node"
    done
}

try_network() {
    while [ ${#nodes[@]} -gt 1 ]; do
        rm -f "$checks"/*.lost "$checks/open" "$checks/together"
        on_nodes "${nodes[@]}" -- network --nodes "$(joined "${nodes[@]}")" --port "$HIVE_PORT" --out "$checks"
        [ -e "$checks/network" ] && break
        # The others may be good: again, without the node that they were to meet on.
        note_fault "${nodes[0]}" "$(cat "$checks/${nodes[0]}.lost" 2>/dev/null || echo "did not finish the network check")"
        nodes=("${nodes[@]:1}")
    done
    for lost in "$checks"/*.lost; do
        if [ -e "$lost" ]; then note_fault "$(basename "$lost" .lost)" "$(cat "$lost")"; fi
    done
    keep_good
}

keep_good() {
    local node good=()
    for node in "${nodes[@]}"; do
        [ -e "$checks/$node.fault" ] || good+=("$node")
    done
    nodes=(${good[@]+"${good[@]}"})
}

too_few() { # ends the script
    local node unfit=()
    if [ ${#nodes[@]} = 0 ] && { [ ${#all[@]} -gt 1 ] || grep -qxE '126|127' "$checks"/*.code 2>/dev/null; }; then
        fail "no node is fit to train on: this is no fault of one node. Mend what is said above and submit the job again;" \
            "HIVE_PREFLIGHT=0 in env.sh trains without these checks"
    fi
    for node in "${all[@]}"; do
        [ ! -e "$checks/$node.fault" ] || unfit+=("$node")
    done
    count_failure
    requeue "too few good nodes" "$(joined "${unfit[@]}")"
}

note_fault() { echo "$2" >>"$checks/$1.fault"; }

last_words() { # NODE: the last line it printed, or what srun said of it, or what srun said first
    { grep -h . "$checks/$1.log" 2>/dev/null || grep -wF "$1" "$checks/srun.log" || head -n 1 "$checks/srun.log" | grep . ||
        echo nothing; } | tail -n 1
}

joined() { (IFS=, && echo "$*"); }
