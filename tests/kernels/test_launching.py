"""A kernel's launcher asks Triton whenever an argument is of another sort, and goes around it otherwise."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton: pip install triton")

from hive_ds.kernels import launching
from hive_ds.kernels.launching import Launcher, Settings
from hive_ds.kernels.triton_launch import _strides


class Kernel:
    """Stands for a Triton kernel ``(x, y, count, scale, B, A)`` and for what it was compiled to."""

    params = tuple(
        SimpleNamespace(name=name, is_constexpr=name in "AB") for name in ("x", "y", "count", "scale", "B", "A")
    )

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.started: list[Any] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        if len(grid) == 3:
            return lambda *arguments: self.started.append((grid, *arguments))

        def launch(*arguments: Any, **settings: int) -> Kernel:
            self.asked.append((grid, *arguments, settings))
            return self

        return launch


@pytest.fixture
def launcher(monkeypatch: pytest.MonkeyPatch) -> Launcher:
    monkeypatch.setattr(launching, "INTERPRETED", False)
    monkeypatch.setattr(torch.version, "hip", None)
    return Launcher(Kernel())


SETTINGS = Settings(A=1, B=2, num_warps=4)
X = torch.zeros(64)


def test_the_second_call_goes_around_triton(launcher: Launcher) -> None:
    launcher(7, (X, X), (32, 0.5), SETTINGS)
    y = torch.ones(8)
    launcher(9, (X, y), (48, 0.25), SETTINGS)
    kernel = launcher.kernel
    assert kernel.asked == [((7,), X, X, 32, 0.5, {"A": 1, "B": 2, "num_warps": 4})]
    assert kernel.started == [((9, 1, 1), X, y, 48, 0.25, 2, 1)]  # constants in the kernel's order


@pytest.mark.parametrize(
    "other",
    [
        {"pointers": (X, X.half())},
        {"pointers": (X, X[1:])},
        {"numbers": (33, 0.5)},
        {"numbers": (1, 0.5)},
        {"numbers": (2**31, 0.5)},
        {"settings": Settings(A=1, B=2, num_warps=8)},
    ],
    ids=["dtype", "unaligned address", "no multiple of 16", "one", "more than 32 bits", "settings"],
)
def test_other_sorts_are_compiled(launcher: Launcher, other: dict[str, Any]) -> None:
    call: dict[str, Any] = {"pointers": (X, X), "numbers": (32, 0.5), "settings": SETTINGS}
    for arguments in (call, call | other, call | other, call):
        launcher(7, *arguments.values())
    assert len(launcher.kernel.asked) == 2
    assert len(launcher.kernel.started) == 2


def test_strides_of_one_token_or_one_head_mean_nothing() -> None:
    rows = torch.zeros(6, 4, 8)
    assert _strides(rows[::2][:1], rows[:, ::2][:, :1]) == [32, 8, 32, 8]


def test_every_integer_counts(launcher: Launcher) -> None:
    for last in (48, 33, 64):
        launcher(7, (X, X), (32, 0.5, last), SETTINGS)
    assert len(launcher.kernel.asked) == 2


def test_for_amd_triton_is_always_asked(launcher: Launcher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "7.0")
    for _ in range(2):
        launcher(7, (X, X), (32, 0.5), SETTINGS)
    assert len(launcher.kernel.asked) == 2
