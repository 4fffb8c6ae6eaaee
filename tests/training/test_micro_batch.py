"""``micro_batch_size: auto``: what is tried and chosen; a run with it is the run with the number."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from itertools import chain, repeat
from pathlib import Path

import pytest
import torch
from forked import run_forked
from tiny_run import TinyRun

from hive_ds.constants import EXIT_STOPPED, IGNORE_INDEX
from hive_ds.data.batch import PackedBatch, stretched
from hive_ds.errors import HiveError
from hive_ds.training import device_memory, micro_batch
from hive_ds.training.device_memory import GpuMemory, HostMemory
from hive_ds.training.micro_batch import SAMPLES, Trial, _as_record, _recall, describe, search

STAGE = "stages.connector_pretraining"
ENDS = ((EXIT_STOPPED, [3]), (0, [0]), (0, []))
"""Exit codes, and steps of trials in each search: the warm-up, 1 and 2 samples; none where the number is known."""
SHORT = ("--set", f"{STAGE}.steps=3", "--set", "data.max_length=64", "--set", "training.tensorboard=false")


def device(resting: float, sample: float, *, always: float = 0.0, step: float = 0.0) -> Callable[[int], Trial]:
    """Steps on a device of which every sample takes ``sample``; ``always`` comes on top, ``step`` in the optimizer."""
    return lambda size: Trial(size, resting, resting + always + size * sample, resting + step)


@pytest.mark.parametrize(
    ("sizes", "steps", "tried", "chosen", "line"),
    [
        ([1, 2, 4, 8], device(0.2, 0.05), [1, 2, 4, 8], 8, "8, which takes 60% .*; it is a rank's whole share"),
        ([1, 2, 4, 8], device(0.2, 0.1), [1, 2, 4], 4, r"4, which takes 60% .*; 8 would take 100% \(predicted\)"),
        ([1, 2, 4, 8], device(0.2, 0.05, always=0.2), [1, 2, 4, 8], 8, "8, .*"),
        ([1, 3, 9], device(0.2, 0.05), [1, 2, 3, 9], 9, "9, .*"),  # 2 gives the slope
        ([1, 7], device(0.2, 0.15), [1, 2], 1, r"1, which takes 35% .*; 7 would take 125% \(predicted\)"),
        ([1, 2], device(0.6, 0.2), [1], 1, r"1, which takes 80% .*; 2 would take 100% \(predicted\)"),
        ([1], device(0.2, 0.05), [1], 1, "1, .*"),
        # The optimizer's peak hides nothing: the line goes through forward and backward alone.
        ([1, 2, 4, 8], device(0.1, 0.15, step=0.7), [1, 2, 4], 4, "4, which takes 80% "),
        # It grows faster than a line, and what was predicted to fit does not: the size before is taken.
        (
            [1, 2, 4],
            lambda size: Trial(size, 0.1, {1: 0.3, 2: 0.5, 4: 0.95}[size], 0.1),
            [1, 2, 4],
            2,
            "2, which takes 50% .*; 4 takes 95%, and 90% may be filled",
        ),
        ([1, 2, 4], device(0.85, 0.1), [1], None, None),
        ([1, 2, 4], device(0.2, 0.01, step=0.75), [1], None, None),
    ],
)
def test_largest_size_that_fits(
    sizes: list[int], steps: Callable[[int], Trial], tried: list[int], chosen: int | None, line: str | None
) -> None:
    found = search(sizes, steps)
    assert [trial.size for trial in found.trials] == tried
    largest = found.largest(sizes)
    assert (largest and largest.size) == chosen
    if line is not None:
        assert re.match(f"micro-batch auto: {line}", describe(found, sizes)), describe(found, sizes)


def test_costliest_batch() -> None:
    """Text repeated to its limit and supervised, images as they are, once a copy."""
    pixels = torch.arange(6.0).view(2, 3, 1, 1)
    one = PackedBatch(torch.tensor([5, 6, 7]), torch.tensor([-100, -100, 7]), [3], [[0, 2]], {"p": pixels}, ["a"], 2)
    found = stretched(one, 5, 2)
    assert found.input_ids.tolist() == [5, 6, 7, 5, 6] * 2
    assert found.labels.tolist() == [IGNORE_INDEX, 6, 7, 5, 6] * 2
    assert (found.text_lengths, found.image_offsets, found.num_images) == ([5, 5], [[0, 2], [0, 2]], 4)
    assert torch.equal(found.images["p"], torch.cat([pixels, pixels]))
    assert stretched(one, 2, 1).input_ids.tolist() == [5, 6]
    bare = PackedBatch(one.input_ids, one.labels, [3], [[3]], {"p": pixels[:1]}, ["b"], 0)
    assert micro_batch.costliest([bare, one, bare]) is one
    assert micro_batch.costliest(chain([bare] * (SAMPLES - 1), repeat(one))) is one
    assert micro_batch.costliest(chain([bare] * SAMPLES, repeat(one))) is bare
    large = PackedBatch(one.input_ids, one.labels, [3], [[3]], {"p": torch.ones(1, 3, 2, 2)}, ["c"], 0)
    assert micro_batch.costliest([one, large]) is large  # one picture, but more of it


def test_memory_is_read_in_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a GPU, what others hold counts: 100 bytes here, beside PyTorch's 300."""
    monkeypatch.setattr(device_memory, "_PROCESS", tmp_path)
    (tmp_path / "status").write_text("Name:\tpython\nVmHWM:\t    3072 kB\nVmRSS:\t    2048 kB\nThreads:\t1\n")
    assert (HostMemory(1).used(), HostMemory(1).peak()) == (2 << 20, 3 << 20)
    assert HostMemory(4).total == HostMemory(1).total // 4
    (tmp_path / "status").write_text("Name:\tpython\n")
    with pytest.raises(HiveError, match=r"the memory of a process cannot be read \(.*status has no VmRSS\)"):
        HostMemory(1).used()
    held = {"memory_reserved": 300, "memory_allocated": 120, "max_memory_allocated": 250, "mem_get_info": (600, 1000)}
    for name, value in {**held, "get_device_name": "a GPU"}.items():
        monkeypatch.setattr(torch.cuda, name, lambda _, value=value: value)
    gpu = GpuMemory(torch.device("cuda"))
    assert (gpu.name, gpu.total, gpu.used(), gpu.peak()) == ("a GPU", 1000, 220, 350)


def test_peak_of_a_process_is_what_it_held_since() -> None:
    memory, size = HostMemory(2), 400 * 2**20
    memory.forget_peak()
    before = memory.used()
    held = torch.ones(size, dtype=torch.uint8)
    del held
    assert 0.9 * size < memory.peak() - before < 1.5 * size
    memory.forget_peak()
    assert memory.peak() < before + 0.5 * size
    assert memory.total * 2 > memory.peak()


def test_run_with_auto_is_the_run_with_the_number(tiny: TinyRun) -> None:
    """Stopped after a step and gone on: the number that was found is kept with the run.

    Its data are remote: the search downloads to the cache of the training that follows in the same process.
    """
    remote = ("--set", f"data.train=file://{tiny.root}/train", "--set", f"data.cache={tiny.root}/cache")
    auto = tiny.arguments(1, "auto", *SHORT, *remote, "--set", f"{STAGE}.micro_batch_size=auto")
    runs = [json.dumps(arguments) for arguments in (auto, tiny.arguments(1, "number", *SHORT))]
    done = run_forked("micro_batch_main:main", runs, tiny.environment(), 1, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = tiny.root / "auto" / "stage1"
    first, again, number = done.stdout.split("exit code ")[:3]
    assert "; the same command goes on from there\n" in first  # no file STOP is there to remove
    assert "micro-batch auto: 2, which takes 60% of the fullest device's memory at its peak; 4 would take 110%" in first
    assert "batch: 8 samples a step over 1 ranks, each 4 x micro-batch 2\n" in first
    assert f"micro-batch auto: 2, found by an earlier start of this run ({folder / 'micro_batch.json'})" in again
    assert "micro-batch auto" not in number
    ends = [line for line in done.stdout.splitlines() if line.startswith("exit code")]
    assert ends == [f"exit code {code}, steps of trials: {steps}" for code, steps in ENDS]
    lines = [tiny.metrics(run, 1, "train") for run in ("auto", "number")]
    for key in ("step", "loss", "grad_norms", "lr", "samples", "skipped_steps"):
        assert [line[key] for line in lines[0]] == [line[key] for line in lines[1]], key
    losses = [tiny.metrics(run, 1, "validation")[-1]["loss"] for run in ("auto", "number")]
    assert losses[0] == losses[1]
    assert [line["micro_batch_size"] for line in tiny.metrics("auto", 1, "start")] == [2, 2]
    assert json.loads((folder / "ds_config.json").read_text())["gradient_accumulation_steps"] == 4
    assert "micro_batch_size: auto" in (folder / "recipe.yaml").read_text()


def test_what_was_found_holds_for_the_same_setting_alone(tmp_path: Path) -> None:
    record, setting = tmp_path / "micro_batch.json", {"ranks": 2, "recipe.data.max_length": 64}
    assert _recall(record, setting, [1, 2, 4]) is None
    record.write_text(_as_record(search([1, 2, 4], device(0.2, 0.1)), 4, setting))
    assert _recall(record, setting, [1, 2, 4]) == 4
    assert _recall(record, {**setting, "ranks": 4}, [1, 2, 4]) is None
    assert _recall(record, setting, [1, 2]) is None
    for damaged in ("{", "{}", "[]", '{"micro_batch_size": 4}'):
        record.write_text(damaged)
        assert _recall(record, setting, [1, 2, 4]) is None
