"""Checks of how checkpoints are written: in the background, on full disks, by attempts that have been replaced.

`test_loop_on_ranks` runs them on 2 ranks.
"""

from __future__ import annotations

import re
import time
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
from checkpoint_checks import held_back, save, signed, writer_of
from full_disk import full_disk
from stage_helpers import config_for, expect_error, make_trainee

from hive_ds.config import TrainingConfig
from hive_ds.errors import OutsideError
from hive_ds.events import read_events
from hive_ds.training.attempt import Agreement, Attempt
from hive_ds.training.checkpoint_files import check_space
from hive_ds.training.checkpoint_writer import SaveReport
from hive_ds.training.distributed import barrier, sum_over_ranks
from hive_ds.training.loop import _report_save
from hive_ds.training.metrics import MetricsLog


def check_full_disk(ranks: Any) -> None:
    """A checkpoint that cannot be written on one rank is said on all, and those before stay as they were.

    On a full disk of rank 0 no metrics can be written either.
    """
    folder = ranks.folder / "full"
    trainee = make_trainee(ranks, config=config_for(2))
    writer = writer_of(ranks, trainee, folder, config_for(2))
    assert save(writer, 1) is None
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    metrics = MetricsLog(ranks.folder / "full.jsonl", ranks.world, 0)
    metrics.write("start", 0, fills="x" * 1950)
    barrier()
    for full in (1, 0):
        with full_disk(2000) if ranks.world.rank == full else nullcontext():
            writer.begin(2, {})
            report = writer.wait()
            assert "File too large" in str(report.failed), report
            barrier()
            assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
            expect_reports(ranks, metrics, report)
    if ranks.world.is_main:
        events = read_events(ranks.folder / "full.jsonl")
        assert [event["event"] for event in events] == ["start", *["checkpoint"] * 3]
    with pytest.raises(OSError, match=r"GB left, and a checkpoint takes 1000000000\.00 GB"):
        check_space(folder, 10**18)
    trainee.engine.close()


def check_attempts(ranks: Any) -> None:
    """Row 11, fenced: an attempt that another has replaced publishes nothing; both stop by a file or by the time."""
    folder = ranks.folder / "attempts"
    trainee = make_trainee(ranks, config=config_for(2))
    old, new = signed(ranks, folder, "old"), signed(ranks, folder, "new")
    barrier()
    if ranks.world.is_main:
        assert "attempt new took over from this one, old; nothing was written" in expect_error(old.check)
    assert "attempt new took over from this one, old; nothing was written" in expect_error(lambda: agree(ranks, old))
    new.check()
    assert not agree(ranks, new).stop
    late = Attempt(folder, ranks.world, {"HIVE_ATTEMPT": "new", "HIVE_STOP_AT": "1000"})
    assert agree(ranks, late).stop
    if ranks.world.is_main:
        (folder / "STOP").touch()
    assert agree(ranks, new).stop
    for given in ("noon", "nan"):
        message = expect_error(lambda given=given: Attempt(folder, ranks.world, {"HIVE_STOP_AT": given}))
        assert message == f"HIVE_STOP_AT is {given!r}; expected seconds since the epoch"
    assert save(writer_of(ranks, trainee, folder, config_for(2)), 1) is None  # one that signs again
    trainee.engine.close()


def check_background_save(ranks: Any) -> None:
    """A save ends at a later step, on all ranks at once; an attempt that is replaced meanwhile publishes nothing."""
    folder = ranks.folder / "background"
    trainee = make_trainee(ranks, config=config_for(2))
    writer = writer_of(ranks, trainee, folder, config_for(2))
    attempt = Attempt(folder, ranks.world, {"HIVE_ATTEMPT": "first"})  # the writer's, which has signed
    slow = ranks.world.rank == 1
    with held_back(slow) as threads:
        writer.begin(1, {})
        while writer.writing and not slow:
            time.sleep(0.001)
        agreed = agree(ranks, attempt, writing=writer.writing)
        assert agreed.writing
        assert writer.advance(agreed.writing) is None
        assert not (folder / "latest").exists()
        threads.set()
        report, steps = None, 0
        while report is None:
            report = writer.advance(agree(ranks, attempt, writing=writer.writing).writing)
            steps += 1
    assert report.failed is None
    assert steps > 1
    assert (folder / "latest").read_text() == "step-000001"
    with held_back() as threads:
        writer.begin(2, {})
        signed(ranks, folder, "new")
        barrier()
        threads.set()
        assert "attempt new took over from this one, first; nothing was written" in expect_error(writer.wait)
    assert [path.name for path in (folder / "checkpoints").glob("[!.]*")] == ["step-000001"]
    trainee.engine.close()


def expect_reports(ranks: Any, metrics: MetricsLog, report: SaveReport) -> None:
    """That a save failed ends the run where it was the last or the recipe says so, and nothing else does."""
    for stop, last in ((False, False), (True, False), (False, True)):
        training = TrainingConfig(stop_on_failed_save=stop)
        job: Any = SimpleNamespace(metrics=metrics, training=training, world=ranks.world)
        if stop or last:
            with pytest.raises(OutsideError) as caught:
                _report_save(job, report, last=last)
            said = r"step 2: no checkpoint could .*File too large.*; earlier ones are untouched"
            assert re.fullmatch(said, str(caught.value))
        else:
            _report_save(job, report)


def agree(ranks: Any, attempt: Attempt, *, writing: bool = False) -> Agreement:
    return attempt.agree(sum_over_ranks(attempt.word(writing=writing), ranks.device))
