"""Local copies of benchmarks in the hub's own parquet files: found, and checked before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Image

from hive_ds.errors import HiveError
from hive_ds.evaluation.benchmarks.catalogue import IMAGE, Benchmark, read_task


def local_task(benchmark: Benchmark, data: Path) -> dict[str, Any]:
    """The benchmark's task file with the paths of its data below ``data`` filled in.

    Raises:
        HiveError: files or columns are missing; a column ``image`` does not hold images.
    """
    task = read_task(benchmark)
    ((split, pattern),) = task["dataset_kwargs"]["data_files"].items()
    files = _find(benchmark, data, pattern)
    _check_columns(benchmark, files, benchmark.columns)
    task["dataset_kwargs"]["data_files"] = {split: [str(file) for file in files]}
    settings = task["lmms_eval_specific_kwargs"]["default"]
    if "image_files" in settings:
        images = _find(benchmark, data, settings["image_files"])
        _check_columns(benchmark, images, ("id", IMAGE))
        settings["image_files"] = [str(file) for file in images]
    return task


def describe_files(task: dict[str, Any]) -> list[dict[str, Any]]:
    """Name, bytes and rows of every data file of a task that `local_task` returned."""
    (files,) = task["dataset_kwargs"]["data_files"].values()
    images = task["lmms_eval_specific_kwargs"]["default"].get("image_files", [])
    return [
        {"file": file, "bytes": Path(file).stat().st_size, "rows": pq.read_metadata(file).num_rows}
        for file in [*files, *images]
    ]


def _find(benchmark: Benchmark, data: Path, pattern: str) -> list[Path]:
    folder = data / Path(pattern).parent
    if not folder.is_dir():
        raise HiveError(f"{benchmark.name}: no folder {folder}; expected the hub's files {pattern} below {data}")
    files = sorted(folder.glob(Path(pattern).name))
    if not files:
        raise HiveError(f"{benchmark.name}: no file {Path(pattern).name} in {folder}; expected the hub's parquet files")
    return files


def _check_columns(benchmark: Benchmark, files: Sequence[Path], columns: Sequence[str]) -> None:
    for file in files:
        try:
            schema = pq.read_schema(file)
        except (pa.ArrowInvalid, OSError) as error:
            raise HiveError(f"{benchmark.name}: {file} is no parquet file: {str(error).splitlines()[0]}") from error
        missing = [column for column in columns if column not in schema.names]
        if missing:
            raise HiveError(
                f"{benchmark.name}: {file} lacks the columns {', '.join(missing)}; it has {', '.join(schema.names)}"
            )
        if IMAGE in columns and not _may_hold_images(schema.field(IMAGE).type):
            raise HiveError(
                f"{benchmark.name}: column image of {file} is of type {schema.field(IMAGE).type}; expected the hub's"
                " struct of bytes and path"
            )


def _may_hold_images(kind: pa.DataType) -> bool:
    return pa.types.is_struct(kind) and "bytes" in [field.name for field in kind]


def with_images(dataset: Dataset) -> Dataset:
    """``dataset`` whose column ``image`` decodes to pictures, also where the files do not say that it holds any."""
    return dataset if isinstance(dataset.features[IMAGE], Image) else dataset.cast_column(IMAGE, Image())
