#!/bin/bash
# Pid 1 of the mini cluster: the switch, munged, slurmctld and the login host. `minicluster.py` starts it in new
# namespaces, after writing BASE/etc, so that everything ends with this process.
set -euo pipefail
base=$1 nodes=$2 here=$(cd "$(dirname "$0")" && pwd)
export SLURM_CONF=$base/etc/slurm.conf

hostname login
ip link set lo up
ip link add br0 type bridge
ip addr add 10.77.0.1/24 dev br0
ip link set br0 up
mount --bind "$base/etc/hosts" /etc/hosts
mount --bind "$base/etc/ssh_config" /etc/ssh/ssh_config

# Slurm only opens the device files of GPUs, so any character device will do.
for gpu in 0 1 2 3 4 5 6 7; do
    mknod "$base/dev/nvidia$gpu" c 1 3 2>/dev/null || ln -s /dev/null "$base/dev/nvidia$gpu"
done
munged --force --key-file="$base/etc/munge.key" --socket="$base/munge.sock" --pid-file="$base/munged.pid" \
    --log-file="$base/log/munged.log" --seed-file="$base/munge.seed"
slurmctld -D -i >"$base/log/slurmctld.out" 2>&1 &
for node in $(seq "$nodes"); do
    bash "$here/boot.sh" "$base" "$node"
done
set +e
while :; do # pid 1 collects the dead
    sleep 3600 &
    wait -n
done
