"""Which weights ZeRO-3 gathers when: DeepSpeed's rules (0.19.8) played through on a recorded step.

A unit's weights are gathered when it is entered, and those of the next units with them, up to
``stage3_prefetch_bucket_size``. They are given up when it is left, unless they are small
(``stage3_param_persistence_threshold``) or needed again soon (``stage3_max_reuse_distance``). The numbers are those of
the steady state, from the third micro-batch on; the first two still learn the order.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from hive_ds.planning.trace import FETCH, Event

PARTITIONED, INFLIGHT, WHOLE = "partitioned", "in flight", "whole"
DIFFERENT = 3
"""Micro-batches of a step after which all others are alike: what the first has left, the second and third find."""


@dataclass(frozen=True)
class GatherLimits:
    """DeepSpeed's keys of ZeRO-3 that decide over gathers, in elements."""

    persistence_threshold: int
    prefetch_bucket: int
    reuse_distance: int
    live_parameters: int


@dataclass(frozen=True)
class Gather:
    """Weights that one message brings."""

    parameters: tuple[str, ...]
    within_node: bool
    """From the node's second copy (hpZ)."""


@dataclass
class Gatherer:
    """The state of every parameter while steps run.

    Args:
        sizes: elements by parameter, in the model's order.
        trained: names of those that train.
        owned: parameters that a module reads itself, by module.
        inside: those and all of the modules inside of it, by module.
        units: modules that are gathered with all that is inside of them.
        events: one forward and backward pass.
        limits: of the policy.
        second_copy: hpZ is on.
    """

    sizes: Mapping[str, int]
    trained: frozenset[str]
    owned: Mapping[str, Sequence[str]]
    inside: Mapping[str, Sequence[str]]
    units: frozenset[str]
    events: Sequence[Event]
    limits: GatherLimits
    second_copy: bool = False
    gathers: list[Gather] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.persistent = [name for name, size in self.sizes.items() if size <= self.limits.persistence_threshold]
        self._status = dict.fromkeys(self.sizes, PARTITIONED)
        self._copied: set[str] = set(self.sizes) - self.trained if self.second_copy else set()
        self._order = {name: place for place, name in enumerate(self.sizes)}
        self._modules = [event.module for event in self.events if event.kind == FETCH]
        self._live = 0
        self._active: dict[str, set[str]] = defaultdict(set)
        self._kept: dict[tuple[str, int], set[str]] = {}

    def run_step(self, micro_batches: int) -> list[list[Gather]]:
        """Gathers of each micro-batch of one optimizer step, after which no weight is whole."""
        starts = []
        self.gathers = []
        for _ in range(micro_batches):
            starts.append(len(self.gathers))
            self._run_micro_batch()
        for name in self.sizes:
            self._active[name].clear()
            self._give_up(name)
        self._copied -= self.trained
        return [self.gathers[start:end] for start, end in zip(starts, [*starts[1:], None], strict=True)]

    def _reads(self, module: str) -> Sequence[str]:
        return self.inside[module] if module in self.units else self.owned[module]

    def _run_micro_batch(self) -> None:
        self._drop_prefetched()
        self._step = 0
        self._fetched_for: dict[str, int] = defaultdict(lambda: -1)
        self._queue = deque(
            (name, step)
            for step, module in enumerate(self._modules)
            for name in sorted(set(self._reads(module)), key=self._order.__getitem__)
        )
        self._backward: dict[str, set[str]] = {}
        for event in self.events:
            if event.kind == FETCH:
                self._fetch(event)
            else:
                self._release(event)
        while self._backward:
            module, recomputed = self._backward.popitem()
            for name in {*self._reads(module), *recomputed}:
                self._active[name].discard(module)
                if name not in self.persistent:
                    self._give_up(name)

    def _fetch(self, event: Event) -> None:
        names = set(self._reads(event.module))
        if not event.forward:
            self._backward.setdefault(event.module, set())
        self._gather(names)
        for name in names:
            self._active[name].add(event.module)
            if event.recomputed and self._backward and name not in self.trained:
                owner = next(reversed(self._backward))
                self._backward[owner].add(name)
                self._active[name].add(owner)
            self._status[name] = WHOLE
        self._prefetch(names)
        self._step += 1

    def _prefetch(self, names: set[str]) -> None:
        """Take what is needed now off the queue, then gather what comes next in it."""
        waiting = {name for name in names if self._fetched_for[name] < self._step}
        taken: set[str] = set()
        while self._queue and len(taken) < len(waiting):
            name, step = self._queue.popleft()
            self._fetched_for[name] = step
            taken.add(name)
        room = min(self.limits.live_parameters - self._live, self.limits.prefetch_bucket)
        ahead: list[str] = []
        size = 0
        while self._queue and size < room:
            name, step = self._queue.popleft()
            self._fetched_for[name] = max(self._fetched_for[name], step)
            if self._status[name] == PARTITIONED and name not in ahead:
                ahead.append(name)
                size += self.sizes[name]
        self._gather(ahead)

    def _gather(self, names: Iterable[str]) -> None:
        wanted = [name for name in names if self._status[name] == PARTITIONED]
        for within_node in (True, False):
            part = [name for name in wanted if (name in self._copied) == within_node]
            if part:
                self.gathers.append(Gather(tuple(sorted(part, key=self._order.__getitem__)), within_node))
        for name in wanted:
            self._status[name] = INFLIGHT
            self._live += self.sizes[name]

    def _release(self, event: Event) -> None:
        names, let_go = set(self._reads(event.module)), self._no_longer_needed(event.module)
        if not event.forward:
            recomputed = self._backward.pop(event.module, set())
            names |= recomputed
            let_go = let_go | {name for name in recomputed if name not in self.persistent}
        for name in names:
            self._active[name].discard(event.module)
            if name in let_go:
                self._give_up(name)

    def _no_longer_needed(self, module: str) -> set[str]:
        """Weights of ``module`` that no module within the reuse distance reads; DeepSpeed decides once per place."""
        place = (module, self._step)
        if place not in self._kept:
            let_go = {
                name
                for name in self._reads(module)
                if name not in self.persistent and self._fetched_for[name] <= self._step
            }
            # Into later modules DeepSpeed looks as deep as into this one, units or not.
            reads = self.inside if module in self.units else self.owned
            passed = 0
            for later in self._modules[self._step :]:
                if passed >= self.limits.reuse_distance:
                    break
                let_go -= set(reads[later])
                passed += sum(self.sizes[name] for name in reads[later])
            self._kept[place] = let_go
        return self._kept[place]

    def _give_up(self, name: str) -> None:
        if self._status[name] != WHOLE or self._active[name]:
            return
        self._status[name] = PARTITIONED
        self._live -= self.sizes[name]
        if self.second_copy:
            self._copied.add(name)

    def _drop_prefetched(self) -> None:
        for name, status in self._status.items():
            if status == INFLIGHT:
                self._status[name] = WHOLE
                self._give_up(name)
