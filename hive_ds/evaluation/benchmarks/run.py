"""An evaluation: local data and golden cases checked, self-tests, then the checkpoint, through lmms-eval."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from loguru import logger

from hive_ds.evaluation.benchmarks.catalogue import named
from hive_ds.evaluation.benchmarks.checkpoint_model import CheckpointModel, this_rank
from hive_ds.evaluation.benchmarks.golden import check_golden
from hive_ds.evaluation.benchmarks.local_data import local_task
from hive_ds.evaluation.benchmarks.report import checkpoint_record, prepare_folder, table, write_results
from hive_ds.evaluation.benchmarks.runner import Outcome, labels, load_tasks, run_model
from hive_ds.evaluation.benchmarks.scores import check_pairs
from hive_ds.evaluation.benchmarks.self_test import run_self_tests


@dataclass(frozen=True)
class Request:
    """What to evaluate."""

    benchmarks: Sequence[str]
    data: Path
    """Folder of the local copies."""
    checkpoint: Path | None = None
    """A model's folder or a run's; None runs the self-tests alone."""
    out: Path | None = None
    """Folder for results; None prints them only."""
    limit: int | None = None
    """Questions of each benchmark, the first ones; None is all."""
    batch_size: int = 16
    device: str | None = None
    dtype: str = "float32"
    encoder: Path | None = None
    """Folder of the exported encoder that the checkpoint must hold; None asks for no certain one."""
    self_test: bool = True


def evaluate(request: Request) -> list[Outcome]:
    """Evaluate on every rank; returns the outcomes, on rank 0, by benchmark.

    Raises:
        HiveError: ``out`` cannot be used, data is missing, a golden case or a self-test fails, or the checkpoint holds
            another encoder.
        RuntimeError: the model failed on a question.
    """
    logger.remove()
    logger.add(sys.stderr, level="WARNING")
    ranks = this_rank(request.device)
    benchmarks = named(request.benchmarks)
    if request.out is not None and request.checkpoint is not None:
        prepare_folder(request.out, [benchmark.name for benchmark in benchmarks])
    configs = {benchmark.name: local_task(benchmark, request.data) for benchmark in benchmarks}
    with ranks.main_process_first():  # it reads the files into the cache of the datasets library
        tasks = load_tasks(benchmarks, configs)
    for benchmark in benchmarks:
        check_golden(benchmark, tasks[benchmark.name])
        if benchmark.name == "mme":
            check_pairs(labels(benchmark, tasks["mme"], request.limit))
    tests = None
    if request.self_test:
        tests = run_self_tests(benchmarks, tasks, limit=request.limit, device=request.device)
        if ranks.is_main_process:
            print(f"self-tests: {len(tests)} scores of models that know the labels are what theory says")
    if request.checkpoint is None:
        return []
    model = CheckpointModel(str(request.checkpoint), request.batch_size, request.device, request.dtype)
    record = checkpoint_record(request.checkpoint, model, request.encoder)  # before lmms-eval drops the model
    outcomes = run_model(model, benchmarks, tasks, request.limit)
    if ranks.is_main_process:
        print(table(outcomes), end="")
        if request.out is not None:
            write_results(request.out, outcomes, configs, record, tests)
    return outcomes
