"""wandb that does not start is said before models are loaded."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hive_ds.config import TrainingConfig
from hive_ds.errors import HiveError
from hive_ds.training.distributed import World
from hive_ds.training.ds_config import start_wandb


def test_wandb_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(HiveError, match=r"wandb is not installed: pip install 'hive-ds\[wandb\]'"):
        start_wandb(TrainingConfig(wandb=True), "run", World())


@pytest.mark.parametrize(
    ("fault", "code"), [(None, 2), ("AuthenticationError", 2), ("CommError", 1)], ids=["no key", "wrong key", "offline"]
)
def test_wandb_that_does_not_start_is_one_line(
    fault: str | None, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a planted fault wandb looks for a key in an empty home, and there is none."""
    wandb = pytest.importorskip("wandb")
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.chdir(tmp_path)

    def fail(**_: str) -> None:
        raise getattr(wandb.errors, str(fault))("it does\nnot work.")

    if fault:
        monkeypatch.setattr(wandb, "init", fail)
    said = "it does not work" if fault else "No API key configured.*"
    with pytest.raises(HiveError, match=f"^training.wandb is true, but wandb does not start: {said}; ") as caught:
        start_wandb(TrainingConfig(wandb=True), "run", World())
    assert caught.value.exit_code == code
    start_wandb(TrainingConfig(wandb=True), "run", World(rank=1, local_rank=1, size=2, local_size=2))
    start_wandb(TrainingConfig(), "run", World())
