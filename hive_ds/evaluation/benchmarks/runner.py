"""lmms-eval's evaluator over local tasks: a model in, answers and scores out."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmms_eval import evaluator
from lmms_eval.tasks import TaskManager

from hive_ds.evaluation.benchmarks.catalogue import Benchmark, write_task
from hive_ds.evaluation.benchmarks.checkpoint_model import ChatModel
from hive_ds.evaluation.benchmarks.scores import Answered, Score, scores


@dataclass(frozen=True)
class Outcome:
    """One benchmark, answered and scored."""

    benchmark: Benchmark
    prompt_version: str
    split: str
    available: int
    """Questions in the local copy."""
    rows: Sequence[Answered]
    scores: Sequence[Score]
    lmms_eval: dict[str, float]
    """All of its figures."""


def load_tasks(benchmarks: Sequence[Benchmark], configs: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """lmms-eval's task objects by benchmark; ``configs`` are of `local_task`."""
    with tempfile.TemporaryDirectory() as folder:
        for benchmark in benchmarks:
            write_task(configs[benchmark.name], Path(folder) / f"{benchmark.name}.yaml")
        manager = TaskManager(include_path=folder, include_defaults=False, model_name="hive_ds")
        loaded = manager.load_task_or_group([benchmark.task for benchmark in benchmarks], task_type="chat")
    return {benchmark.name: loaded[benchmark.task] for benchmark in benchmarks}


def labels(benchmark: Benchmark, task: Any, limit: int | None) -> list[dict[str, Any]]:
    """The rows that are asked about, without images."""
    docs = task.eval_docs.select_columns(benchmark.labels)
    return list(docs.select(range(min(limit or len(docs), len(docs)))))


def run_model(
    model: ChatModel, benchmarks: Sequence[Benchmark], tasks: Mapping[str, Any], limit: int | None
) -> list[Outcome]:
    """Answers and scores of one model; empty on other ranks than 0.

    Raises:
        RuntimeError: the model failed, or other questions came back than were asked.
    """
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


def _outcome(benchmark: Benchmark, task: Any, results: Mapping[str, Any], limit: int | None) -> Outcome:
    # Ranks return their questions one rank after the other.
    samples = sorted(results["samples"][benchmark.task], key=lambda sample: sample["doc_id"])
    asked = labels(benchmark, task, limit)
    if [sample["doc_id"] for sample in samples] != list(range(len(asked))):
        raise RuntimeError(f"{benchmark.name}: {len(samples)} answers came back for {len(asked)} questions")
    rows = [Answered(row, sample["filtered_resps"][0], sample) for row, sample in zip(asked, samples, strict=True)]
    own = {
        name.partition(",")[0]: float(value)
        for name, value in results["results"][benchmark.task].items()
        if name.endswith(",none") and "_stderr" not in name and isinstance(value, (int, float))
    }
    split, available = task.config.test_split, len(task.eval_docs)
    return Outcome(benchmark, task.VERSION, split, available, rows, scores(benchmark, rows, own), own)
