"""A mini cluster, and a clone of the scripts with `env.sh` filled in for it."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path += [str(HERE), str(HERE.parent / "data"), str(HERE.parent / "training")]

from minicluster import MiniCluster, missing  # noqa: E402
from site_clone import SlurmSite  # noqa: E402
from ssh_hosts import Hosts  # noqa: E402
from tiny_run import TinyRun  # noqa: E402


@pytest.fixture(scope="session")
def site_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What all nodes see."""
    reason = missing()
    if reason:
        pytest.skip(reason)
    return tmp_path_factory.mktemp("site")


@pytest.fixture(scope="session")
def tiny(site_folder: Path) -> TinyRun:
    """Models, data and recipe of tiny runs."""
    return TinyRun.make(site_folder / "tiny")


@pytest.fixture(scope="module")
def hosts(site_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    """Two nodes that Slurm and ssh reach."""
    shared = SlurmSite.shared_folders(site_folder)
    cluster = MiniCluster.up(tmp_path_factory.mktemp("hosts") / "cluster", 2, shared=shared)
    yield Hosts(cluster, Path(tempfile.mkdtemp(prefix="hosts-", dir=site_folder)))
    cluster.down()


@pytest.fixture
def cluster(site_folder: Path, tmp_path: Path) -> Iterator[MiniCluster]:
    """Three nodes without GPUs."""
    cluster = MiniCluster.up(tmp_path / "cluster", 3, shared=SlurmSite.shared_folders(site_folder))
    yield cluster
    cluster.down()


@pytest.fixture
def site(cluster: MiniCluster, site_folder: Path) -> SlurmSite:
    """The scripts, edited for the cluster."""
    return SlurmSite.make(site_folder, cluster)
