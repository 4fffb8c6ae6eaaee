"""An evaluation: local data and golden cases checked, self-tests, then the checkpoint, through lmms-eval."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmms_eval import evaluator
from lmms_eval.tasks import TaskManager
from loguru import logger

from hive_ds.errors import HiveError
from hive_ds.evaluation.benchmarks.catalogue import Benchmark, named, write_task
from hive_ds.evaluation.benchmarks.checkpoint_model import ChatModel, CheckpointModel, this_rank
from hive_ds.evaluation.benchmarks.golden import check_golden
from hive_ds.evaluation.benchmarks.local_data import local_task
from hive_ds.evaluation.benchmarks.report import Outcome, checkpoint_record, print_table, write_results
from hive_ds.evaluation.benchmarks.scores import Answered, check_pairs, scores
from hive_ds.evaluation.benchmarks.stand_ins import KINDS, StandIn
from hive_ds.evaluation.benchmarks.theory import expected

TOLERANCE = 1e-9
"""Between what a stand-in scores and what it must: rounding of sums."""


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
    dtype: str = "auto"
    self_test: bool = True


def evaluate(request: Request) -> list[Outcome]:
    """Evaluate on every rank; returns the outcomes, on rank 0, by benchmark.

    Raises:
        HiveError: data is missing, a golden case or a self-test fails.
        RuntimeError: the model failed on a question.
    """
    logger.remove()
    logger.add(sys.stderr, level="WARNING")
    accelerator = this_rank(request.device)
    benchmarks = named(request.benchmarks)
    configs = {benchmark.name: local_task(benchmark, request.data) for benchmark in benchmarks}
    with accelerator.main_process_first():  # it reads the files into the cache of the datasets library
        tasks = _load(benchmarks, configs)
    for benchmark in benchmarks:
        check_golden(benchmark, tasks[benchmark.name])
        if benchmark.name == "mme":
            check_pairs(_labels(benchmark, tasks["mme"], request.limit))
    tests = _self_tests(benchmarks, tasks, request) if request.self_test else None
    if request.checkpoint is None:
        return []
    model = CheckpointModel(str(request.checkpoint), request.batch_size, request.device, request.dtype)
    record = checkpoint_record(request.checkpoint, model)  # lmms-eval drops the model when it has answered
    outcomes = _run(model, benchmarks, tasks, request.limit)
    if accelerator.is_main_process:
        print_table(outcomes)
        if request.out is not None:
            write_results(request.out, outcomes, configs, record, tests)
    return outcomes


def _load(benchmarks: Sequence[Benchmark], configs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """lmms-eval's task objects, by benchmark."""
    with tempfile.TemporaryDirectory() as folder:
        for benchmark in benchmarks:
            write_task(configs[benchmark.name], Path(folder) / f"{benchmark.name}.yaml")
        manager = TaskManager(include_path=folder, include_defaults=False, model_name="hive_ds")
        loaded = manager.load_task_or_group([benchmark.task for benchmark in benchmarks], task_type="chat")
    return {benchmark.name: loaded[benchmark.task] for benchmark in benchmarks}


def _labels(benchmark: Benchmark, task: Any, limit: int | None) -> list[dict[str, Any]]:
    docs = task.eval_docs.select_columns(benchmark.labels)
    return list(docs.select(range(min(limit or len(docs), len(docs)))))


def _run(model: ChatModel, benchmarks: Sequence[Benchmark], tasks: dict[str, Any], limit: int | None) -> list[Outcome]:
    """Answers and scores of one model; empty on other ranks than 0."""
    chosen = {benchmark.task: tasks[benchmark.name] for benchmark in benchmarks}
    model.task_dict = {name: task.dataset for name, task in chosen.items()}
    results = evaluator.evaluate(
        model,
        chosen,
        limit=limit,
        bootstrap_iters=0,
        # Scoring does not look at images: without this they would be decoded again.
        cli_args=argparse.Namespace(process_with_media=False),
    )
    if results is None:
        return []
    return [_outcome(benchmark, tasks[benchmark.name], results, limit) for benchmark in benchmarks]


def _outcome(benchmark: Benchmark, task: Any, results: dict[str, Any], limit: int | None) -> Outcome:
    # Ranks return their questions one rank after the other.
    samples = sorted(results["samples"][benchmark.task], key=lambda sample: sample["doc_id"])
    labels = _labels(benchmark, task, limit)
    if [sample["doc_id"] for sample in samples] != list(range(len(labels))):
        raise RuntimeError(f"{benchmark.name}: {len(samples)} answers came back for {len(labels)} questions")
    rows = [Answered(row, sample["filtered_resps"][0], sample) for row, sample in zip(labels, samples, strict=True)]
    own = {
        name.partition(",")[0]: float(value)
        for name, value in results["results"][benchmark.task].items()
        if name.endswith(",none") and "_stderr" not in name and isinstance(value, (int, float))
    }
    return Outcome(
        benchmark, task.VERSION, task.config.test_split, len(task.eval_docs), rows, scores(benchmark, rows, own), own
    )


def _self_tests(benchmarks: Sequence[Benchmark], tasks: dict[str, Any], request: Request) -> list[dict[str, Any]]:
    """Run the stand-ins and compare with theory; the comparisons, on rank 0.

    Raises:
        HiveError: one differs.
    """
    found = []
    for kind in KINDS:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):  # progress of no interest
            outcomes = _run(StandIn(kind, request.device), benchmarks, tasks, request.limit)
        for outcome in outcomes:
            theory = expected(outcome.benchmark, [row.labels for row in outcome.rows], kind)
            by_name = {score.name: score for score in outcome.scores}
            for name, (official, lmms_eval) in theory.items():
                score = by_name[name]
                found.append(
                    {
                        "benchmark": outcome.benchmark.name,
                        "model": kind,
                        "score": name,
                        "expected": official,
                        "value": score.value,
                        "expected_lmms_eval": lmms_eval,
                        "lmms_eval": score.lmms_eval,
                    }
                )
    for test in found:
        both = ((test["value"], test["expected"]), (test["lmms_eval"], test["expected_lmms_eval"]))
        if any(value is None or abs(value - wanted) > TOLERANCE for value, wanted in both):
            raise HiveError(
                f"self-test of {test['benchmark']}: model {test['model']} scores {test['score']} {test['value']}"
                f" (lmms-eval: {test['lmms_eval']}); expected {test['expected']} ({test['expected_lmms_eval']}),"
                " so no score can be believed"
            )
    if found and int(os.environ.get("RANK", "0")) == 0:
        print(f"self-tests: {len(found)} scores of {', '.join(KINDS)} are what theory says")
    return found
