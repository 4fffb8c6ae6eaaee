"""What a run records: one JSONL file, always; TensorBoard and wandb through DeepSpeed's monitor.

Every line has ``event`` and ``step`` (optimizer steps done). Events: ``start`` (an attempt's devices, hosts, versions),
``train`` (the keys of `TRAIN_KEYS`), ``validation`` (``loss``, ``text_loss``), ``answers`` (``share`` of questions),
``maps`` (gradient norms by encoder block: ``block_grad_norms`` of the step's batch, ``sample_grad_norms`` of the
held-out sample), ``checkpoint`` (``blocked_seconds`` that training stood still, ``seconds`` in all, ``failed``: why
there is none), ``skipped_step`` (``sample_ids`` of every rank), ``bad_samples`` (``samples``: id and reason), ``stop``
(as asked, by the file or the time), ``end``.
"""

from __future__ import annotations

import json
import math
import resource
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from hive_ds.files import write_whole
from hive_ds.training.distributed import World

TRAIN_KEYS = {
    "loss": "mean over supervised tokens of the steps since the last line, skipped ones left out, nats",
    "lr": "learning rate of each optimizer group",
    "grad_norm": "L2 norm of all gradients before clipping",
    "grad_norms": "the same per module group",
    "tokens_per_second_per_gpu": "text tokens",
    "images_per_second_per_gpu": "images, dummies not counted",
    "mfu": "model FLOPs per second over this device's measured matrix-product rate",
    "data_wait_share": "share of the time spent waiting for data, mean over ranks; a GPU may compute meanwhile",
    "memory_gb": "peak memory of rank 0: allocated on its GPU, or resident on a CPU",
    "skipped_steps": "steps so far whose gradient was not finite",
    "supervised_share": "share of the text tokens that carry loss",
    "samples": "samples so far",
    "cut_samples": "of those, longer than data.max_length and cut at the end",
    "bad_samples": "unreadable samples so far; each was replaced by another",
    "seconds_per_step": "mean since the last line",
    "eta_seconds": "time left at that pace",
    "slowest_rank": "rank that holds the others up most",
    "slowest_ratio": "how many times longer a step takes than if that rank were like the median rank (an estimate)",
    "slowest_by": "what it is slow in: compute (a matrix product, timed on each rank) or data (its wait for them)",
}
"""Keys of a ``train`` line and what they mean."""

LISTED_IN_MONITOR = ("loss", "grad_norm", "tokens_per_second_per_gpu", "images_per_second_per_gpu", "mfu", "memory_gb")


class MetricsLog:
    """The JSONL file of a stage; only rank 0 writes.

    Args:
        path: of the file.
        world: this process among all.
        first_step: steps done before this process; lines after it are an earlier attempt's and are dropped.

    Raises:
        OSError: lines could not be dropped; the file is what it was.
    """

    def __init__(self, path: Path, world: World, first_step: int) -> None:
        self._path = path if world.is_main else None
        self._failed = False
        """Whether the last line is missing, or there in part."""
        if self._path and self._path.exists():
            _drop_lines(self._path, first_step)

    def write(self, event: str, step: int, **values: Any) -> None:
        """Append one line; a full disk costs it, not the training."""
        if self._path is None:
            return
        line = json.dumps(_finite({"event": event, "step": step, "time": time.time(), **values}))
        try:
            with self._path.open("a") as file:
                file.write("\n" * self._failed + f"{line}\n")
        except OSError as error:
            if not self._failed:
                lost = f"{self._path} cannot be written ({error}); its lines are lost until it can be"
                tqdm.write(f"warning: step {step}: {lost}, training goes on")
            self._failed = True
        else:
            self._failed = False


@dataclass
class Totals:
    """Sums over all ranks, of one step or of the steps since the last line."""

    supervised: float = 0.0
    tokens: float = 0.0
    images: float = 0.0
    samples: float = 0.0
    cut: float = 0.0
    bad: float = 0.0
    flops: float = 0.0
    wait: float = 0.0
    """Seconds that ranks waited for data."""

    def vector(self) -> list[float]:
        """The sums in order."""
        return list(vars(self).values())

    def add(self, other: Totals) -> None:
        """Add another step's sums."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


@dataclass
class Meter:
    """Turns steps into the numbers of a ``train`` line.

    Args:
        num_ranks: ranks of the run.
        matmul_rate: FLOPs per second of one device.
        device: where memory is measured.
    """

    num_ranks: int
    matmul_rate: float
    device: torch.device
    samples: float = 0.0
    cut_samples: float = 0.0
    bad_samples: float = 0.0
    _totals: Totals = field(default_factory=Totals)
    _losses: list[tuple[float, float]] = field(default_factory=list)
    """Mean and supervised tokens of each step that was not skipped."""
    _steps: int = 0
    _seconds: float = 0.0
    """Of training, up to the last pause."""
    _start: float = field(default_factory=time.perf_counter)

    def add(self, totals: Totals, loss: float) -> None:
        """Record one step: its sums and its mean loss, NaN where it was skipped."""
        self._totals.add(totals)
        if math.isfinite(loss):
            self._losses.append((loss, totals.supervised))
        self._steps += 1
        self.samples += totals.samples
        self.cut_samples += totals.cut
        self.bad_samples += totals.bad

    def read(self, steps_left: int) -> dict[str, float]:
        """The numbers since the last call, and start over."""
        self.pause()
        seconds, self._seconds = self._seconds, 0.0
        totals, per_gpu = self._totals, seconds * self.num_ranks
        values = {
            "loss": _mean(self._losses),
            "tokens_per_second_per_gpu": totals.tokens / per_gpu,
            "images_per_second_per_gpu": totals.images / per_gpu,
            "mfu": totals.flops / per_gpu / self.matmul_rate,
            "data_wait_share": totals.wait / per_gpu,
            "memory_gb": _peak_memory(self.device) / 1e9,
            "supervised_share": totals.supervised / max(totals.tokens, 1),
            "samples": self.samples,
            "cut_samples": self.cut_samples,
            "bad_samples": self.bad_samples,
            "seconds_per_step": seconds / max(self._steps, 1),
            "eta_seconds": seconds / max(self._steps, 1) * steps_left,
        }
        self._totals, self._losses, self._steps = Totals(), [], 0
        self.restart()
        return values

    def pause(self) -> None:
        """Leave out the time from now to `restart`: a validation or a checkpoint is not training."""
        self._seconds += time.perf_counter() - self._start
        self.restart()

    def restart(self) -> None:
        """Count time from now on."""
        self._start = time.perf_counter()


def _mean(losses: list[tuple[float, float]]) -> float:
    """Mean over supervised tokens; NaN where every step was skipped."""
    if not losses:
        return math.nan
    return sum(loss * tokens for loss, tokens in losses) / max(sum(tokens for _, tokens in losses), 1)


def _peak_memory(device: torch.device) -> float:
    """Bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _drop_lines(path: Path, first_step: int) -> None:
    """Drop the lines of later steps, and those that a kill or a full disk cut short; of a run that starts anew, all."""
    text = path.read_text(errors="replace")
    lines = [line for line in text.splitlines() if _step_of(line) <= (first_step or -1)]
    kept = "".join(f"{line}\n" for line in lines)
    if kept == text:
        return
    try:
        write_whole(path, kept)
    except OSError as error:
        raise OSError(f"{path}: lines of an earlier attempt cannot be dropped ({error}); it is unchanged") from error


def _step_of(line: str) -> float:
    """Step of a line; infinite for a line that was cut short or damaged."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def _finite(value: Any) -> Any:
    """JSON has no NaN: write null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return value
