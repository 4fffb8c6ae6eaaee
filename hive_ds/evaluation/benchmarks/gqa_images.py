"""GQA's images, which lie in files of their own, looked up by the ``imageId`` of a question."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from datasets import Dataset, load_dataset
from PIL import Image

from hive_ds.errors import HiveError
from hive_ds.evaluation.benchmarks.local_data import with_images


def doc_to_visual(doc: Mapping[str, Any], settings: Mapping[str, Any]) -> list[Image.Image]:
    """The image of one question; ``settings`` are the task's ``lmms_eval_specific_kwargs``, with ``image_files``.

    Raises:
        HiveError: no file holds the image.
    """
    dataset, rows = _index(tuple(settings["image_files"]))
    row = rows.get(doc["imageId"])
    if row is None:
        raise HiveError(f"gqa: question {doc['id']} asks about image {doc['imageId']}, which the local copy lacks")
    return [dataset[row]["image"].convert("RGB")]


@lru_cache(maxsize=1)
def _index(files: Sequence[str]) -> tuple[Dataset, dict[str, int]]:
    cache = os.environ.get("LMMS_EVAL_DATASETS_CACHE")  # where lmms-eval puts its own
    dataset = with_images(load_dataset("parquet", data_files=list(files), split="train", cache_dir=cache))
    return dataset, {name: row for row, name in enumerate(dataset["id"])}
