"""SIGKILL of the whole job at any moment, under a supervisor: the run computes what an undisturbed one does."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from kills import STEPS_A_KILL, KilledRun
from safetensors.torch import load_file
from tiny_run import TinyRun

NAMES = ("straight", "killed")
SAME = ("step", "loss", "lr", "grad_norms", "samples")


@pytest.mark.parametrize(
    ("ranks", "kills"),
    [
        (1, 2),
        pytest.param(1, 80, marks=[pytest.mark.long, pytest.mark.timeout(3600)]),
        pytest.param(2, 20, marks=[pytest.mark.long, pytest.mark.timeout(3600)]),
    ],
)
def test_killed_at_random_moments_equals_straight(ranks: int, kills: int, tmp_path: Path) -> None:
    tiny = TinyRun.make(tmp_path)
    straight = KilledRun(tiny, NAMES[0], ranks, STEPS_A_KILL * kills)
    straight.train("--set", "training.keep_every=1")
    killed = replace(straight, name=NAMES[1], hits=Counter())
    killed.train_and_kill(seed=kills, kills=kills)
    print(f"\n{kills} kills on {ranks} ranks hit: {dict(killed.hits)}")
    assert sum(killed.hits.values()) == kills

    wanted = {line["step"]: line for line in straight.lines()}
    assert list(wanted) == list(range(1, straight.steps + 1))
    steps = [line for line in killed.lines() if "step" in line]
    assert {line["step"] for line in steps} == set(wanted)
    # Every try, and not the last one alone, saw these samples and had this loss.
    assert steps == [wanted[line["step"]] for line in steps]

    resumed = [line for line in killed.lines() if "resumed" in line]
    assert resumed
    for line in resumed:
        manifest = straight.folder / "checkpoints" / line["resumed"] / "manifest.json"
        assert state_hashes(line["manifest"]) == state_hashes(json.loads(manifest.read_text())), line["resumed"]

    merged = [[{key: line[key] for key in SAME} for line in tiny.metrics(name, 1, "train")] for name in NAMES]
    assert merged[0] == merged[1]
    first, second = (load_file(tiny.root / name / "stage1" / "model" / "model.safetensors") for name in NAMES)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def state_hashes(manifest: dict[str, dict[str, str]]) -> dict[str, str]:
    """SHA-256 of the files of weights and optimizer state."""
    return {name: entry["sha256"] for name, entry in manifest.items() if name.startswith("pieces")}
