"""What a person does with checkpoints: list them, check them, write them anew for another number of ranks.

Nothing here needs ranks or DeepSpeed.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from hive_ds.errors import HiveError
from hive_ds.training.checkpoint_files import MANIFEST, aside_of, describe_file, faults_of, publish, step_folders
from hive_ds.training.piece_files import PieceCopy, PieceReader, file_name, piece_files
from hive_ds.training.pieces import STATE


@dataclass(frozen=True)
class CheckpointInfo:
    """One checkpoint of a stage."""

    path: Path
    written: datetime | None
    ranks: int | None
    zero_stage: int | None
    """Of the run that wrote it."""
    files: int
    num_bytes: int
    faults: list[str]
    """Why it cannot be used; empty where it is whole."""
    resumes: bool
    """A resume would take this one."""


def list_checkpoints(run: Path) -> dict[Path, list[CheckpointInfo]]:
    """The checkpoints of a run by stage folder, newest first; every file is read.

    Raises:
        HiveError: ``run`` has no stage.
    """
    stages = sorted(path for path in run.glob("stage*") if path.is_dir())
    if not stages:
        raise HiveError(f"run {run}: holds no stage folder (stage1, ...)")
    return {stage: _stage_checkpoints(stage) for stage in stages}


def listing(stages: Mapping[Path, Sequence[CheckpointInfo]]) -> str:
    """What `list_checkpoints` found, as text: a line a checkpoint below one for its stage."""
    lines = []
    for stage, infos in stages.items():
        lines.append(str(stage) if infos else f"{stage}: no checkpoint")
        for info in infos:
            written = f"{info.written:%Y-%m-%d %H:%M:%S}" if info.written else "unknown time"
            size = f"{info.num_bytes / 1e9:.2f} GB in {info.files} files"
            origin = f"{_or_unknown(info.ranks)} ranks, ZeRO {_or_unknown(info.zero_stage)}"
            verdict = f"not whole: {'; '.join(info.faults)}" if info.faults else "whole"
            taken = ", a resume takes this one" if info.resumes else ""
            lines.append(f"  {info.path.name}  {written}  {size}  {origin}  {verdict}{taken}")
    return "\n".join(lines)


def verify_checkpoints(path: Path) -> list[tuple[Path, list[str]]]:
    """Each checkpoint of a run, of a stage, or the one at ``path``, with its faults.

    Raises:
        HiveError: there is none.
    """
    stages = (path, *path.glob("stage*"))
    found = [path] if _is_checkpoint(path) else [one for stage in stages for one in step_folders(stage)]
    if not found:
        raise HiveError(f"{path}: neither a checkpoint (step-000100) nor a run or stage folder that holds any")
    return [(one, faults_of(one)) for one in sorted(found)]


def reshard(checkpoint: Path, out: Path, ranks: int) -> None:
    """Write ``checkpoint`` again at the new folder ``out``, its pieces cut as ZeRO 3 on ``ranks`` ranks cuts them.

    Such ranks then read one file each. Random states are kept for the ranks that wrote them, so a resume from ``out``
    equals one from ``checkpoint`` to the bit.

    Args:
        checkpoint: a whole one.
        out: must not exist; for a resume its name is that of ``checkpoint``, below another run's stageN/checkpoints.
        ranks: number of files of pieces. One is held in memory at a time.

    Raises:
        HiveError: the checkpoint is not whole, ``out`` exists, or there are no ranks.
    """
    if ranks < 1:
        raise HiveError(f"ranks is {ranks}; expected at least 1")
    if out.exists():
        raise HiveError(f"{out}: exists; name a new folder")
    sizes, pieces = _parameter_sizes(whole_checkpoint(checkpoint)), piece_files(checkpoint)
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = aside_of(out)
    aside.mkdir()
    try:
        with PieceReader(pieces) as reader:
            for rank in range(ranks):
                _read_share(reader, sizes, rank, ranks).write(aside / file_name(rank))
        for path in checkpoint.iterdir():
            if path not in pieces and path.name != MANIFEST:
                shutil.copyfile(path, aside / path.name)
        publish(aside, out, {path.name: describe_file(path) for path in sorted(aside.iterdir())})
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def whole_checkpoint(path: Path) -> dict[str, Any]:
    """What ``state.json`` of a checkpoint holds.

    Raises:
        HiveError: it is not whole; every fault is named.
    """
    if not path.is_dir():
        raise HiveError(f"checkpoint {path}: no such folder")
    faults = faults_of(path)
    if faults:
        raise HiveError(f"checkpoint {path} is not whole: {'; '.join(faults)}")
    state: dict[str, Any] = json.loads((path / "state.json").read_text())
    return state


def _is_checkpoint(path: Path) -> bool:
    return (path / MANIFEST).exists() or (path / "state.json").exists() or bool(piece_files(path))


def _stage_checkpoints(stage: Path) -> list[CheckpointInfo]:
    infos: list[CheckpointInfo] = []
    for path in step_folders(stage):
        faults = faults_of(path)
        resumes = not faults and not any(info.resumes for info in infos)
        infos.append(_describe(path, faults, resumes))
    return infos


def _describe(path: Path, faults: list[str], resumes: bool) -> CheckpointInfo:
    try:
        state = dict(json.loads((path / "state.json").read_text()))
    except (OSError, ValueError, TypeError):
        state = {}
    files = [file for file in path.iterdir() if file.is_file()]
    return CheckpointInfo(
        path,
        datetime.fromtimestamp(state["time"]) if "time" in state else None,
        state.get("ranks"),
        state.get("zero_stage"),
        len(files),
        sum(file.stat().st_size for file in files),
        faults,
        resumes,
    )


def _or_unknown(value: int | None) -> str:
    return "?" if value is None else str(value)


def _parameter_sizes(state: dict[str, Any]) -> dict[str, int]:
    shapes: dict[str, list[int]] = state["identity"]["parameters"]
    return {name: math.prod(shape) for name, shape in shapes.items()}


def _read_share(reader: PieceReader, sizes: dict[str, int], rank: int, ranks: int) -> PieceCopy:
    """A rank's part of every parameter, cut as ZeRO 3 cuts: into equal parts, the last ones shorter or empty."""
    tensors, places = {}, {}
    for name, size in sizes.items():
        part = -(-size // ranks)
        start = part * rank
        count = min(part, size - start)
        if count > 0:
            places[name] = (start, count)
            for key in STATE:
                tensors[f"{key}/{name}"] = reader.read(key, name, start, count)
    return PieceCopy(tensors, places)
