#!/bin/bash
# Switch a node on: nested namespaces with their own pid 1, and a cable to the switch.
set -euo pipefail
base=$1 node=$2 here=$(cd "$(dirname "$0")" && pwd)
setsid unshare --net --mount --uts --ipc --pid --fork --kill-child --mount-proc \
    bash "$here/node.sh" "$base" "$node" >>"$base/log/node$node.out" 2>&1 </dev/null &
outside=$!
first=
for _ in $(seq 250); do
    first=$(pgrep -P "$outside" || true)
    [ -n "$first" ] && break
    sleep 0.02
done
echo "${first:?node$node did not start}" >"$base/pid.node$node"
ip link del "v$node" 2>/dev/null || true # the cable of a node that crashed
ip link add "v$node" type veth peer name eth0 netns "$first"
ip link set "v$node" master br0 up
