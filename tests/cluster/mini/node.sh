#!/bin/bash
# Pid 1 of a node: its own name, address, /dev/shm, /run and /tmp; shared folders below /tmp are bound back.
set -uo pipefail
base=$1 node=$2
hostname "node$node"
ip link set lo up
for _ in $(seq 250); do
    ip link show eth0 >/dev/null 2>&1 && break
    sleep 0.02
done
ip addr add "10.77.0.$((10 + node))/24" dev eth0
ip link set eth0 up
mount --bind "$base/etc/hosts.node$node" /etc/hosts
mount -t tmpfs -o size=2g shm /dev/shm
root=$base/root.node$node
mkdir -p "$root"
mount -t tmpfs tmpfs "$root"
while read -r shared; do
    mkdir -p "$root/${shared#/tmp/}"
    mount --rbind "$shared" "$root/${shared#/tmp/}"
done <"$base/etc/shared"
mount --move "$root" /tmp
mount -t tmpfs tmpfs /run
mkdir -p /run/sshd "$base/spool.node$node"
cd / || exit 1
export SLURM_CONF=$base/etc/slurm.conf
/usr/sbin/sshd -f "$base/etc/sshd_config"
# A real node's daemons start without the caller's environment, and so do their jobs.
env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin SLURM_CONF="$SLURM_CONF" slurmd -D &
while :; do # pid 1 collects the dead
    sleep 3600 &
    wait -n
done
