"""How much work each sample of a folder is: a small table beside the shards, read without opening one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from hive_ds.data.schema import Sample
from hive_ds.errors import HiveError

SIZES = "sizes.npy"
Sizes = npt.NDArray[np.int32]


def sample_size(sample: Sample) -> tuple[int, int]:
    """Characters of all turns, and images."""
    return sum(len(turn.content) for turn in sample.turns), len(sample.images)


def write_sizes(folder: Path, sizes: Sequence[tuple[int, int]] | Sizes) -> None:
    """Write the table of the samples of ``folder``, in their order."""
    np.save(folder / SIZES, np.array(sizes, dtype=np.int32).reshape(-1, 2))


def read_sizes(folder: str | Path, num_samples: int) -> Sizes:
    """(samples, 2) int32: characters and images of each sample; HiveError where the table is missing or not theirs."""
    path = Path(folder) / SIZES
    if not path.is_file():
        raise HiveError(f"data folder {folder}: holds no {SIZES}; convert the data again to have it")
    try:
        sizes = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # numpy's reader of the header raises SyntaxError and tokenize's TokenError, too
        raise HiveError(f"{path}: cannot be read ({error})") from error
    if sizes.shape != (num_samples, 2):
        raise HiveError(f"{path}: has shape {sizes.shape}; expected ({num_samples}, 2), a row for each sample")
    return sizes
