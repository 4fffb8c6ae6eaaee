"""Two hosts of a mini cluster as somebody without Slurm uses them."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from minicluster import MiniCluster
from site_clone import REPOSITORY
from tiny_run import TinyRun

BINARIES = Path(sys.executable).parent


@dataclass(frozen=True)
class Hosts:
    """Two hosts, and a folder that they share."""

    cluster: MiniCluster
    folder: Path

    def command(self, *command: str) -> list[str]:
        """A command line on the login host, in the folder."""
        carried = ("HIVE_CARRIED=two words", "HIVE_ATTEMPT=mine")
        env = (f"PYTHONPATH={REPOSITORY}", f"PATH={os.environ['PATH']}", *carried)
        return self.cluster.command("env", f"--chdir={self.folder}", *env, *command)

    def hive_ds(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run ``hive-ds``."""
        code = "import sys; from hive_ds.cli import main; sys.exit(main())"
        full = self.command(sys.executable, "-c", code, *arguments)
        return subprocess.run(full, capture_output=True, text=True, timeout=60)

    def hostfile(self, *lines: str) -> str:
        """Write one; returns its name."""
        (self.folder / "hostfile").write_text("".join(f"{line}\n" for line in lines))
        return "hostfile"

    @contextmanager
    def clock_ahead(self, node: str, seconds: int) -> Iterator[None]:
        """Have Python on a host tell the time so many seconds ahead: another file lies over one that it reads first."""
        site = next(Path(sysconfig.get_path("purelib")).glob("*.pth"))
        planted = self.folder / "planted.pth"
        real = 'time.real = getattr(time, "real", time.time)'  # such files may be read twice
        planted.write_text(f"import time; {real}; time.time = lambda time=time: time.real() + {seconds}\n")
        self.cluster.run("mount", "--bind", str(planted), str(site), node=node)
        try:
            yield
        finally:
            self.cluster.run("umount", str(site), node=node)

    def train(self, launcher: str, tiny: TinyRun, run: str, *options: str, slots: int = 1) -> list[str]:
        """The command that trains stage 1 on both hosts, ``slots`` ranks each."""
        hostfile = self.hostfile("# the mini cluster", f"node1 slots={slots}", f"node2 slots={slots}")
        if launcher == "deepspeed":
            assert self.hive_ds("hosts", "env", hostfile).returncode == 0
            return self.command(
                *(str(BINARIES / "deepspeed"), "--hostfile", hostfile, "--module", "hive_ds.train"),
                *tiny.arguments(1, run, *options),
            )
        code = "import sys; from hive_ds.cli import main; sys.exit(main())"
        arguments = ("hosts", "run", hostfile, "--", *tiny.arguments(1, run, *options))
        return self.command(sys.executable, "-c", code, *arguments)

    def ranks(self, node: str) -> list[str]:
        """Process numbers on a host of everything that trains: launchers, ranks, workers."""
        lines = self.cluster.run("ps", "-eo", "pid,args", node=node).splitlines()
        return [line.split()[0] for line in lines if "hive_ds.train" in line or "hive_ds.launch" in line]
