"""A cluster on one machine: network namespaces with a Slurm controller, nodes with slurmd and sshd, and a switch.

Slurm, munge, ssh and the network are real; the nodes share this machine's cores and folders. It is up in half a second
and leaves nothing behind but its folder. It needs root and the Debian packages in `PACKAGES`.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PACKAGES = "slurmctld slurmd slurm-client munge iproute2 openssh-server pdsh"
_PROGRAMS = (
    "slurmctld",
    "slurmd",
    "sbatch",
    "munged",
    "ip",
    "sshd",
    "pdsh",
    "ssh-keygen",
    "setpriv",
    "unshare",
    "nsenter",
)
_NAMESPACES = ("--net", "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc")
_PATH = f"{os.environ['PATH']}:/usr/local/sbin:/usr/sbin:/sbin"

SLURM_CONF = """\
ClusterName=mini
SlurmctldHost=login(10.77.0.1)
AuthType=auth/munge
AuthInfo=socket={base}/munge.sock
SlurmUser=root
StateSaveLocation={base}/state
SlurmdSpoolDir={base}/spool.%n
SlurmctldPidFile={base}/slurmctld.pid
SlurmdPidFile={base}/slurmd.%n.pid
SlurmctldLogFile={base}/log/slurmctld.log
SlurmdLogFile={base}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
ReturnToService=2
SlurmdTimeout={patience}
MessageTimeout=3
KillWait=3
MinJobAge=3600
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
{gpus}NodeName=node[1-{nodes}] NodeAddr=10.77.0.[11-{last}] CPUs=8 RealMemory=8000{gres}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""

SSHD_CONFIG = """\
Port 22
HostKey {base}/etc/ssh_host_key
AuthorizedKeysFile {base}/etc/id.pub
PermitRootLogin prohibit-password
PasswordAuthentication no
UsePAM no
StrictModes no
PidFile none
"""

SSH_CONFIG = """\
Host *
    IdentityFile {base}/etc/id
    UserKnownHostsFile {base}/etc/known_hosts
    StrictHostKeyChecking yes
    ConnectTimeout 5
"""


def missing() -> str | None:
    """Why this machine cannot hold a mini cluster, or None."""
    if os.geteuid() != 0:
        return "the mini cluster needs root: run these tests as root"
    absent = [name for name in _PROGRAMS if shutil.which(name, path=_PATH) is None]
    if absent:
        return f"no {', '.join(absent)}: apt-get install {PACKAGES}"
    if subprocess.run(["unshare", *_NAMESPACES, "true"], capture_output=True).returncode:
        return "this machine does not allow new namespaces (unshare failed): run where CAP_SYS_ADMIN is given"
    return None


@dataclass(frozen=True)
class MiniCluster:
    """A running cluster of hosts login, node1, node2, ..."""

    base: Path
    outer: int
    """Its pid 1, as this machine sees it."""

    @classmethod
    def up(
        cls, base: Path, nodes: int, *, gpus: int = 0, patience: int = 5, shared: tuple[Path, ...] = ()
    ) -> MiniCluster:
        """Start a cluster.

        Args:
            base: new folder for its files, which every node sees.
            nodes: number of nodes.
            gpus: devices a node that Slurm takes for GPUs; no program can compute on them.
            patience: seconds after which Slurm takes a silent node for dead; sites have minutes.
            shared: more folders that every node sees. All nodes see what is outside of /tmp anyhow.
        """
        for name in ("etc", "state", "log", "dev"):
            (base / name).mkdir(parents=True)
        _write_config(base, nodes, gpus, patience, [base, *shared])
        # Also when this process is killed before it can take the cluster down.
        tied = ["setpriv", "--pdeathsig", "KILL"]
        command = [*tied, "unshare", *_NAMESPACES, "bash", str(HERE / "mini" / "outer.sh"), str(base), str(nodes)]
        with (base / "log" / "outer.out").open("w") as output:
            parent = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={"PATH": _PATH},
                start_new_session=True,
            )
        outer = wait_for(lambda: _child(parent.pid), 5, "the namespaces")
        cluster = cls(base, outer)
        try:
            wait_for(lambda: cluster._idle() == nodes, 30, f"{nodes} idle nodes")
        except TimeoutError:
            cluster.down()
            raise
        return cluster

    def down(self) -> None:
        """Kill everything in it, and wait until it is gone."""
        os.kill(self.outer, signal.SIGKILL)
        wait_for(lambda: _has_ended(self.outer), 10, "the end")

    def command(self, *command: str, node: str | None = None) -> list[str]:
        """The command line that runs ``command`` on ``node``, or on the login host, in the current folder."""
        env = ["env", f"SLURM_CONF={self.base}/etc/slurm.conf", *command]
        enter = ["nsenter", "--target", str(self.outer), "--all", f"--wd={os.getcwd()}"]
        if node is not None:
            enter += ["nsenter", "--target", (self.base / f"pid.{node}").read_text().strip(), "--all", "--wd=/"]
        return [*enter, *env]

    def run(self, *command: str, node: str | None = None, timeout: float = 60, **options: Any) -> str:
        """Run a command to its end and return what it printed; AssertionError unless it exits with 0."""
        done = self.start(*command, node=node, timeout=timeout, **options)
        assert done.returncode == 0, f"{' '.join(command)}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def start(
        self, *command: str, node: str | None = None, timeout: float = 60, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end, whatever its exit code."""
        full = self.command(*command, node=node)
        env = {**os.environ, "PATH": _PATH}
        return subprocess.run(full, capture_output=True, text=True, timeout=timeout, env=env, **options)

    def crash(self, node: str) -> None:
        """Switch a node off, as a power cut would."""
        self.run("kill", "-9", (self.base / f"pid.{node}").read_text().strip())

    def boot(self, node: str) -> None:
        """Switch a node that crashed on again."""
        self.run("bash", str(HERE / "mini" / "boot.sh"), str(self.base), node.removeprefix("node"))

    def cut(self, node: str) -> None:
        """Pull the network cable of a node, whose processes go on; folders stay shared."""
        self.run("ip", "link", "set", f"v{node.removeprefix('node')}", "down")

    def heal(self, node: str) -> None:
        """Put the cable back."""
        self.run("ip", "link", "set", f"v{node.removeprefix('node')}", "up")

    @contextmanager
    def listening(self, node: str, port: int) -> Iterator[None]:
        """A port of a node in the hands of a program that accepts connections and says nothing."""
        code = f"import socket, sys; s = socket.create_server(('', {port})); sys.stdin.read()"
        command = self.command(sys.executable, "-c", code, node=node)
        with subprocess.Popen(command, stdin=subprocess.PIPE):  # which ends when its stdin closes
            wait_for(lambda: f":{port}" in self.run("ss", "-ltn", node=node), 20, "the listener")
            yield

    def _idle(self) -> int:
        done = self.start("sinfo", "--noheader", "--states=idle", "--format=%D", timeout=10)
        return int(done.stdout.strip() or 0) if done.returncode == 0 else -1


def wait_for(condition: Callable[[], Any], seconds: float, what: str, every: float = 0.05) -> Any:
    """Return ``condition()`` once it is true; TimeoutError after ``seconds``."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds:.0f} s for {what}")
        time.sleep(every)
    return value


def _write_config(base: Path, nodes: int, gpus: int, patience: int, shared: list[Path]) -> None:
    etc = base / "etc"
    values = {
        "base": base,
        "nodes": nodes,
        "patience": patience,
        "last": 10 + nodes,
        "gpus": "GresTypes=gpu\n" if gpus else "",
        "gres": f" Gres=gpu:{gpus}" if gpus else "",
    }
    (etc / "slurm.conf").write_text(SLURM_CONF.format(**values))
    (etc / "gres.conf").write_text(f"Name=gpu File={base}/dev/nvidia[0-{gpus - 1}]\n" if gpus else "")
    (etc / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")  # else slurmd looks for /sys/fs/cgroup and stops
    (etc / "sshd_config").write_text(SSHD_CONFIG.format(**values))
    (etc / "ssh_config").write_text(SSH_CONFIG.format(**values))
    (etc / "munge.key").write_bytes(os.urandom(1024))
    (etc / "munge.key").chmod(0o600)
    for key in ("id", "ssh_host_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(etc / key)], check=True)
    host_key = " ".join((etc / "ssh_host_key.pub").read_text().split()[:2])
    names = {f"node{i}": f"10.77.0.{10 + i}" for i in range(1, nodes + 1)}
    (etc / "known_hosts").write_text("".join(f"{name},{address} {host_key}\n" for name, address in names.items()))
    hosts = "127.0.0.1 localhost\n10.77.0.1 login\n" + "".join(f"{names[name]} {name}\n" for name in names)
    (etc / "hosts").write_text(hosts)
    for name in names:  # Debian's own line, which makes a host call itself by a loopback address
        (etc / f"hosts.{name}").write_text(f"127.0.1.1 {name}\n{hosts}")
    below = sorted({path.resolve() for path in shared if path.resolve().is_relative_to("/tmp")})
    outermost = [path for path in below if not any(other in path.parents for other in below)]
    (etc / "shared").write_text("".join(f"{path}\n" for path in outermost))


def _child(pid: int) -> int | None:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(children[0]) if children else None


def _has_ended(pid: int) -> bool:
    """Whether this process is gone, or a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):  # the latter where it goes between opening and reading
        return True
    return stat.rsplit(")", 1)[1].split()[0] == "Z"


def python_folders() -> tuple[Path, ...]:
    """Folders that this Python and its packages need, for ``shared``."""
    return tuple({Path(sys.prefix), Path(sys.base_prefix), HERE.parents[1]})
