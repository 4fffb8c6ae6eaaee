"""The tutorial's sections on clusters, pasted as they stand, on real Slurm and on hosts with ssh."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from site_clone import SlurmSite, training_lines
from ssh_hosts import Hosts

sys.path.append(str(Path(__file__).parents[1] / "docs"))
from tutorial import SLURM, SSH, paste, sections

pytestmark = [pytest.mark.cluster, pytest.mark.long, pytest.mark.timeout(1500)]


def make_data_and_recipe(folder: Path) -> None:
    """The tutorial's sections before training."""
    for number in ("1.", "2.", "3."):
        for block in sections()[number]:
            paste(block, folder)


def test_slurm(site: SlurmSite) -> None:
    make_data_and_recipe(site.clone)
    (block,) = sections()[SLURM]
    said = site.login("bash", "-ec", block.text)
    job = int(re.fullmatch(r"Submitted batch job (\d+)\n", said)[1])
    assert site.wait(job, seconds=600) == "COMPLETED", site.log(job)
    assert len(training_lines(site.clone / "runs" / "tutorial" / "slurm")) == 4


def test_ssh(hosts: Hosts, tmp_path: Path) -> None:
    make_data_and_recipe(hosts.folder)
    (tmp_path / "hive-ds").write_text(
        f"#!{sys.executable}\nimport sys\nfrom hive_ds.cli import main\nsys.exit(main())\n"
    )
    (tmp_path / "hive-ds").chmod(0o755)
    (block,) = sections()[SSH]
    command = hosts.command("bash", "-ec", f'PATH="$0:$PATH"\n{block.text}', str(tmp_path))
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert "2 hosts, 2 slots: no fault found" in done.stdout
    assert len(training_lines(hosts.folder / "runs" / "tutorial" / "ssh")) == 4
