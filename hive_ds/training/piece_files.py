"""Pieces in safetensors, one file a rank, read back by any number of ranks."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from hive_ds.errors import HiveError
from hive_ds.files import give_usual_access
from hive_ds.training.pieces import STATE, Piece


def file_name(rank: int) -> str:
    """The file of a rank's pieces."""
    return f"pieces-{rank:05d}.safetensors"


def piece_files(checkpoint: Path) -> list[Path]:
    """The files of all ranks' pieces."""
    return sorted(checkpoint.glob("pieces-*.safetensors"))


@dataclass(frozen=True)
class PieceCopy:
    """A rank's pieces in memory of their own, which further steps do not change."""

    tensors: dict[str, Tensor]
    """``STATE/NAME`` -> fp32 on the CPU."""
    places: dict[str, tuple[int, int]]
    """Name of a parameter -> first element and number of elements."""

    @classmethod
    def of(cls, pieces: Iterable[Piece]) -> PieceCopy:
        """Copy ``pieces``; takes 12 bytes an element of CPU memory."""
        tensors: dict[str, Tensor] = {}
        places: dict[str, tuple[int, int]] = {}
        for piece in pieces:
            places[piece.name] = (piece.start, piece.count)
            for key, value in piece.values.items():
                tensors[f"{key}/{piece.name}"] = value.detach().to("cpu", torch.float32, copy=True)
        return cls(tensors, places)

    def write(self, path: Path) -> None:
        """Write the file of these pieces."""
        save_file(self.tensors, path, metadata={"places": json.dumps(self.places)})
        give_usual_access(path)


class PieceReader:
    """All pieces of a checkpoint, looked up by parameter and place."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._files: list[Any] = []
        self._places: dict[str, list[tuple[int, int, int]]] = {}
        for number, path in enumerate(paths):
            file = safe_open(path, framework="pt")
            self._files.append(file)
            for name, (start, count) in json.loads(file.metadata()["places"]).items():
                self._places.setdefault(name, []).append((start, count, number))

    def __enter__(self) -> PieceReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.clear()

    def read_into(self, piece: Piece) -> None:
        """Fill ``piece`` with what was saved of its part of its parameter.

        Raises:
            HiveError: the checkpoint does not hold all of it.
        """
        for key in STATE:
            self._copy(key, piece.name, piece.start, piece.values[key])

    def read(self, key: str, name: str, start: int, count: int) -> Tensor:
        """``count`` elements from ``start`` on of a parameter's `STATE` ``key``, fp32; errors as `read_into`."""
        part = torch.empty(count)
        self._copy(key, name, start, part)
        return part

    def _copy(self, key: str, name: str, start: int, target: Tensor) -> None:
        end, filled = start + target.numel(), 0
        for saved_start, count, number in sorted(self._places.get(name, [])):
            low, high = max(start + filled, saved_start), min(end, saved_start + count)
            if low == start + filled < high:
                saved = self._files[number].get_slice(f"{key}/{name}")[low - saved_start : high - saved_start]
                target[low - start : high - start].copy_(saved)
                filled = high - start
        if filled != target.numel():
            raise HiveError(f"the checkpoint holds {filled} of the {target.numel()} elements of {name} asked for")
