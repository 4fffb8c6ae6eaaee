"""The benchmarks: their names, the columns that they need, and their task files filled in for local copies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hive_ds.errors import HiveError

TASKS = Path(__file__).parent / "tasks"
IMAGE = "image"


@dataclass(frozen=True)
class Benchmark:
    """One benchmark, evaluated on one split of one data set of the hub."""

    name: str
    columns: tuple[str, ...]
    """That prompt and scores are made from; ``image`` among them where the questions hold it."""
    cluster: str | None = None
    """Column that tells which questions are about the same image, so that their errors are not independent."""

    @property
    def task(self) -> str:
        """The name under which lmms-eval knows it: a built-in task of the same name would win."""
        return f"hive_{self.name}"

    @property
    def labels(self) -> list[str]:
        """The columns without the image."""
        return [column for column in self.columns if column != IMAGE]


SCIENCEQA = ("image", "question", "choices", "answer", "hint")
VQA = ("image", "question_id", "question", "answers")
BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark("mme", ("question_id", "image", "question", "answer", "category"), "question_id"),
        Benchmark("gqa", ("id", "imageId", "question", "answer"), "imageId"),
        Benchmark("ok_vqa", VQA),
        Benchmark("scienceqa", SCIENCEQA),
        Benchmark("scienceqa_img", SCIENCEQA),
        Benchmark("textvqa_val", (*VQA, "image_id"), "image_id"),
        Benchmark("pope", ("question_id", "question", "answer", "image_source", "image", "category"), "image_source"),
    )
}


def named(names: Sequence[str]) -> list[Benchmark]:
    """The benchmarks of these names, each once.

    Raises:
        HiveError: no name, or an unknown one.
    """
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown or not names:
        raise HiveError(f"benchmark {', '.join(unknown) or '(none)'}: expected some of {', '.join(BENCHMARKS)}")
    return [BENCHMARKS[name] for name in dict.fromkeys(names)]


def read_task(benchmark: Benchmark) -> dict[str, Any]:
    """The task file as it comes with the package; paths of data are patterns below the folder of local copies."""
    task: dict[str, Any] = yaml.load((TASKS / f"{benchmark.name}.yaml").read_text(), Loader=_Loader)
    return task


def write_task(task: dict[str, Any], path: Path) -> None:
    """Write a task file that lmms-eval reads (``--include_path`` its folder)."""
    path.write_text(yaml.dump(task, Dumper=_Dumper, sort_keys=False, width=1000))


class _Function(str):
    """What follows ``!function`` in a task file."""


class _Loader(yaml.SafeLoader):
    pass


class _Dumper(yaml.SafeDumper):
    pass


_Loader.add_constructor("!function", lambda _, node: _Function(node.value))
_Dumper.add_representer(_Function, lambda dumper, name: dumper.represent_scalar("!function", str(name)))
