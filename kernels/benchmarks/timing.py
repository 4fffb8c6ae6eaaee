"""How long one call takes: replays of CUDA graphs on a GPU, a host clock elsewhere."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .case import Arguments, require_gradients
from .peer import Peer

Step = Callable[[int], object]
"""One call on the copy of the inputs with that number."""

GRAPH_SECONDS = 2e-3
"""A graph holds calls for about as long, so that starting it is a small part of what is timed."""
FLUSH_BYTES = 2**28
"""Written before each replay: several times any L2 cache."""


class Steps:
    """The calls of one peer in one direction, with everything that is not timed done beforehand."""

    def __init__(self, peer: Peer, direction: str, copies: int | None = None) -> None:
        """``copies`` of the inputs, all if None."""
        self.peer, self.direction = peer, direction
        self.inputs: list[tuple[Arguments, list[Tensor], Tensor]] = []
        train = peer.shape.directions != ("forward",) and peer.refuses("backward") is None
        for arguments, cotangent in peer.case.copies[:copies]:
            native = {name: x.detach().clone() for name, x in peer.native(arguments).items()}
            leaves = require_gradients(native) if train else []
            self.inputs.append((native, leaves, peer.native_output(cotangent)))
        self.outs = [self._forward(i) for i in range(len(self.inputs))] if direction == "backward" else []

    def __call__(self, i: int) -> object:
        if self.direction == "forward":
            return self._forward(i)
        native, leaves, cotangent = self.inputs[i]
        out = self.outs[i] if self.outs else self.peer(native)
        return torch.autograd.grad(out, leaves, cotangent, retain_graph=bool(self.outs))

    def __len__(self) -> int:
        return len(self.inputs)

    def _forward(self, i: int) -> Tensor:
        native, leaves, _ = self.inputs[i]
        with torch.set_grad_enabled(bool(leaves)):
            return self.peer(native)


@contextmanager
def backward_can_run_twice() -> Iterator[None]:
    """Let compiled code keep what its backward needs: timing the backward alone runs it again and again."""
    import torch._functorch.config as config

    with config.patch(donated_buffer=False):
        yield


class Clock:
    """Times one peer in one direction. `sample` gives one reading of seconds a call; readings of peers interleave."""

    graphed = False

    def __init__(self, steps: Steps) -> None:
        self.steps, self.turn = steps, 0

    def sample(self) -> float:
        """Seconds of one call by the host clock."""
        start = time.perf_counter()
        self._next()
        return time.perf_counter() - start

    def _next(self) -> None:
        self.steps(self.turn % len(self.steps))
        self.turn += 1


class EventClock(Clock):
    """CUDA events around a number of calls: for what cannot be captured as a graph."""

    def __init__(self, steps: Steps) -> None:
        self.flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=steps.peer.case.device)
        super().__init__(steps)
        self.calls = len(steps) if steps.peer.graphed else 1
        for _ in range(2):
            self.sample()

    def sample(self) -> float:
        """Seconds a call, gaps between launches included if the host is slower than the device."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        start.record()
        self._run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3 / self.calls

    def _run(self) -> None:
        for _ in range(self.calls):
            self._next()


class GraphClock(EventClock):
    """CUDA events around the replay of a graph of several calls, each on another copy of the inputs."""

    graphed = True

    def __init__(self, peer: Peer, direction: str) -> None:
        # Autograd runs a backward on the stream of its forward, and only the capturing stream can be captured.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.graph: torch.cuda.CUDAGraph | None = None
            steps = Steps(peer, direction)
            super().__init__(steps)
            self.calls = len(steps) * max(1, int(GRAPH_SECONDS / max(self.sample(), 1e-6) / len(steps)))
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                super()._run()
        self.graph = graph
        torch.cuda.current_stream().wait_stream(stream)
        self.sample()

    def _run(self) -> None:
        if self.graph is None:
            super()._run()
        else:
            self.graph.replay()


def told(error: Exception) -> str:
    """Kind and first line of an error, which may say nothing."""
    return f"{type(error).__name__}: {''.join(str(error).splitlines()[:1])}"


def clock(peer: Peer, direction: str) -> tuple[Clock, str]:
    """The best clock for this peer here, and why it is not a graph's ("" if it is, or on a CPU)."""
    if peer.case.device.type != "cuda":
        return Clock(Steps(peer, direction)), ""
    if not peer.graphed:
        return EventClock(Steps(peer, direction)), "timed without a graph"
    try:
        return GraphClock(peer, direction), ""
    except RuntimeError as error:
        torch.cuda.synchronize()
        return EventClock(Steps(peer, direction)), f"no graph: {told(error)}"


def interleaved(clocks: dict[str, Clock], *, seconds: float, least: int = 3) -> dict[str, list[float]]:
    """Readings of every clock, one of each in turn, so that a change of the machine's speed meets all alike.

    Args:
        clocks: by peer.
        seconds: stop after so long.
        least: but not before so many rounds.
    """
    readings: dict[str, list[float]] = {name: [] for name in clocks}
    start = time.perf_counter()
    for round_number in range(100):
        if round_number >= least and time.perf_counter() - start > seconds:
            break
        for name, one in clocks.items():
            readings[name].append(one.sample())
    return readings


def spread(readings: list[float]) -> float:
    """Half the distance of the quartiles over the median."""
    if len(readings) < 2:
        return 0.0
    low, middle, high = statistics.quantiles(readings, n=4)
    return (high - low) / 2 / middle


def peak_bytes(peer: Peer, direction: str) -> int | None:
    """Most device memory that one call takes beyond its inputs; None on a CPU."""
    if peer.case.device.type != "cuda":
        return None
    steps = Steps(peer, direction, copies=1)
    steps(0)
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    kept = steps(0)
    torch.cuda.synchronize()
    del kept
    return torch.cuda.max_memory_allocated() - before


def eager_calls(peer: Peer, direction: str, calls: int) -> Callable[[], None]:
    """A function that makes so many calls as a model without graphs does, and waits for them."""
    steps = Steps(peer, direction)
    cuda = peer.case.device.type == "cuda"

    def go() -> None:
        for i in range(calls):
            steps(i % len(steps))
        if cuda:
            torch.cuda.synchronize()

    return go


def ceilings(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """This device's measured rates: bytes/s of a large copy (read and written), FLOP/s of a large matrix product."""
    cuda = device.type == "cuda"
    size, side = (2**31, 8192) if cuda else (2**25, 256)
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    copy = _median_seconds(lambda: target.copy_(source), cuda)
    product = _median_seconds(lambda: left @ right, cuda)
    return {"bytes_per_second": 2 * size / copy, "flops_per_second": 2 * side**3 / product}


def _median_seconds(action: Callable[[], object], cuda: bool) -> float:
    readings = []
    for _ in range(13):
        if cuda:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            action()
            end.record()
            end.synchronize()
            readings.append(start.elapsed_time(end) * 1e-3)
        else:
            begin = time.perf_counter()
            action()
            readings.append(time.perf_counter() - begin)
    return statistics.median(readings[3:])
