"""Check the hosts of a hostfile before a run, and run on them over ssh."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hive_ds.errors import HiveError
from hive_ds.launch.hostfile import Host, carried_variables
from hive_ds.launch.preflight import gigabytes
from hive_ds.launch.preflight_verdict import CLOCK_SKEW
from hive_ds.launch.probe import SHM_PER_RANK

SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "-o", "ServerAliveInterval=5")
"""Without questions; a host that falls silent is given up after 15 s."""

PORT = 29500
"""DeepSpeed's own default of --master_port."""

OF_THIS_START = ("HIVE_ATTEMPT", "HIVE_STOP_AT")
"""Variables that are carried to this start's ranks but must not stand in a file for later ones."""

PATIENCE = 60.0
"""Seconds that a host may take to answer."""

GIGABYTE = 10**9
DISK = 20 * GIGABYTE
SHM_ADVICE = "remount it larger (mount -o remount,size=16G /dev/shm), or start the container with --shm-size=16g"


@dataclass(frozen=True)
class Report:
    """What one host said, or why it did not."""

    host: Host
    values: dict[str, Any]
    error: tuple[str, str] | None = None
    """The reason, and what to do."""
    skew: float = 0.0
    """Seconds that its clock is ahead of this host's, less than the round trip could explain."""


@dataclass(frozen=True)
class HostFault:
    """What is wrong with a host, and what to do about it."""

    host: str
    what: str
    advice: str

    def __str__(self) -> str:
        return f"{self.host}: {self.what}; {self.advice}"


def check_hosts(
    hosts: Sequence[Host], *, folder: Path, port: int = PORT, patience: float = PATIENCE
) -> list[HostFault]:
    """Ask every host about itself; returns its faults.

    Args:
        hosts: of the hostfile; the first is to hold rank 0.
        folder: of the run, which every host must be able to write to.
        port: that rank 0 is to listen on.
        patience: seconds that a host may take to answer.
    """
    with ThreadPoolExecutor(max_workers=32) as pool:
        reports = list(pool.map(lambda host: _ask(host, folder, port, hosts[0].address, patience), hosts))
    faults = [HostFault(report.host.name, *report.error) for report in reports if report.error]
    good = [report for report in reports if not report.error]
    for report in good:
        faults += [HostFault(report.host.name, *fault) for fault in _faults(report, good[0], folder)]
        if report.host == hosts[0] and not report.values["port_free"]:
            faults.append(HostFault(report.host.name, f"port {port} is in use", "choose another --master_port"))
    return faults


def run_on_hosts(hosts: Sequence[Host], train: Sequence[str], *, port: int = PORT) -> int:
    """Train on all hosts, one ssh each; when one fails, end all. Returns the exit code of the first that failed."""
    running = {}
    for number, host in enumerate(hosts):
        place = ["--nodes", len(hosts), "--node-rank", number, "--ranks", host.slots]
        meeting = ["--master", hosts[0].address, "--port", port, "--tied"]
        command = [sys.executable, "-m", "hive_ds.launch.node", *map(str, [*place, *meeting]), "--", *train]
        # stdin stays open: when it closes, for whatever reason, the other end stops.
        with _ssh_is_installed():
            running[host] = subprocess.Popen([*SSH, host.name, _remote(command)], stdin=subprocess.PIPE)
    try:
        return _first_failure(running)
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()


def _first_failure(running: dict[Host, subprocess.Popen[bytes]]) -> int:
    waiting = dict(running)
    while waiting:
        for host, process in list(waiting.items()):
            code = process.poll()
            if code:
                print(f"{host.name} ended with exit code {code}; ending the others", file=sys.stderr, flush=True)
                return code
            if code == 0:
                del waiting[host]
        time.sleep(0.1)
    return 0


@contextmanager
def _ssh_is_installed() -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise HiveError(f"{error.filename}: not found; install an ssh client") from error


def _remote(command: Sequence[str]) -> str:
    """A shell command line that runs ``command`` in this folder with this environment."""
    own = {name: os.environ[name] for name in OF_THIS_START if name in os.environ}
    variables = [f"{name}={value}" for name, value in {**carried_variables(os.environ), **own}.items()]
    return f"cd {shlex.quote(os.getcwd())} && exec env {shlex.join([*variables, *command])}"


def _ask(host: Host, folder: Path, port: int, master: str, patience: float) -> Report:
    probe = (Path(__file__).parent / "probe.py").read_text()
    command = shlex.join([sys.executable, "-", str(port), str(folder.absolute()), master])
    before = time.time()
    asked = [*SSH, host.name, command]
    try:
        with _ssh_is_installed():
            done = subprocess.run(
                asked, input=probe, capture_output=True, text=True, errors="replace", timeout=patience
            )
    except subprocess.TimeoutExpired:
        return Report(host, {}, (f"no answer within {patience:.0f} s", f"see what it does: ssh {host.name} uptime"))
    after = time.time()
    said = (done.stderr.strip() or done.stdout.strip() or "nothing").splitlines()[-1]
    if done.returncode == 255:
        advice = f"ssh {host.name} true must work without a question: start the host, copy your key to it"
        return Report(host, {}, (f"not reachable by ssh: {said}", advice))
    if done.returncode:
        advice = "install the same environment there, at the same path"
        return Report(host, {}, (f"{sys.executable} does not run there: {said}", advice))
    try:
        values = json.loads(done.stdout.splitlines()[-1])
        early, late = before - values["time"], values["time"] - after
    except (IndexError, ValueError, TypeError, KeyError):  # of a forced command, say
        advice = f"ssh {host.name} COMMAND must run COMMAND there, and print nothing behind it"
        return Report(host, {}, (f"{sys.executable} was not run there: {said}", advice))
    return Report(host, values, skew=max(late, 0.0) - max(early, 0.0))


def _faults(report: Report, first: Report, folder: Path) -> Iterator[tuple[str, str]]:
    """What is wrong with a host, and what to do."""
    values, slots = report.values, report.host.slots
    for name, version in values["versions"].items():
        expected = first.values["versions"][name]
        if version is None:
            yield f"{name} is not installed", "install it there, or hive-ds's environment at the same path"
        elif expected is not None and version != expected:
            yield f"{name} is {version}, but {expected} on {first.host.name}", "install the same version"
    if values["gpus"] and slots > values["gpus"]:
        yield f"{slots} slots, but {values['gpus']} GPUs", f"write slots={values['gpus']} in the hostfile"
    if not values["gpus"] and slots > values["cores"]:
        advice = f"write slots={values['cores']} in the hostfile, or load its GPU driver"
        yield f"{slots} slots, but no GPU and {values['cores']} cores", advice
    if not values["master_known"]:
        yield f"does not know the address of {first.host.address}", "write it into /etc/hosts there, or mend its DNS"
    if values["shm_free"] is None or values["shm_free"] < slots * SHM_PER_RANK:
        expected = f"expected {slots * SHM_PER_RANK / GIGABYTE:.1f} GB for {slots} slots"
        yield f"/dev/shm has {gigabytes(values['shm_free'])}; {expected}", SHM_ADVICE
    if values["disk_free"] is None:
        yield f"cannot write to {folder.absolute()}", "it must be the same shared folder on every host"
    elif values["disk_free"] < DISK:
        free = gigabytes(values["disk_free"])
        yield f"{folder} has {free} free; expected {DISK / GIGABYTE:.0f} GB", "make room, or name another folder"
    if abs(report.skew) > CLOCK_SKEW:
        yield f"its clock is {report.skew:+.0f} s off this host's", "start a time service (chrony, ntpd) on both"
