"""Check one shard at a time, in this process or in several; what comes of it does not depend on how many."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Generator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from hive_ds.children import process_pool
from hive_ds.data.images import decode_image
from hive_ds.data.inspection.findings import Finding, Findings
from hive_ds.data.inspection.text import TextSettings, kind_of, report_text, supervised
from hive_ds.data.mds.reading import Shard, ShardFile, open_folder, sample_from
from hive_ds.data.mds.sizes import SIZES, read_sizes, sample_size
from hive_ds.data.schema import Sample
from hive_ds.errors import HiveError

READ_AT_ONCE = 1 << 20


@dataclass
class TokenCounts:
    """What a tokenizer made of the samples that training can use, and why it refused the others."""

    lengths: list[int] = field(default_factory=list)
    supervised: int = 0
    cut: int = 0
    lossless: int = 0
    refused: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Kind of reason -> number of samples, and the first of them with its own reason."""

    def refuse(self, kind: str, count: int, example: str) -> None:
        """Count ``count`` more samples that are refused for ``kind``."""
        before, first = self.refused.get(kind, (0, example))
        self.refused[kind] = (before + count, first)


@dataclass
class ShardReport:
    """What was found in one shard."""

    findings: Findings = field(default_factory=Findings)
    characters: list[int] = field(default_factory=list)
    """Of each sample that makes sense."""
    numbers: list[int] = field(default_factory=list)
    """Of each sample whose id was read; ``id_hashes`` holds 64 bits of it, in the same order."""
    id_hashes: list[int] = field(default_factory=list)
    images: int = 0
    unhashed: int = 0
    """Files for which the index lists no sha256."""
    tokens: TokenCounts = field(default_factory=TokenCounts)


class ShardChecker:
    """Checks the shards of one folder."""

    def __init__(self, folder: Path, settings: TextSettings | None) -> None:
        self.shards = open_folder(folder)
        self._settings = settings
        self._tokenizer = settings.load() if settings else None
        try:
            self._sizes: npt.NDArray[np.int32] | None = read_sizes(folder, len(self.shards))
        except HiveError:
            self._sizes = None  # missing or broken as a whole, which `verify` says once

    def check(self, number: int) -> ShardReport:
        """Check shard ``number``: its files, then every sample."""
        shard, report = self.shards.shards[number], ShardReport()
        if self._check_files(shard, report):
            for index in range(shard.first, shard.first + shard.samples):
                self._check_sample(index, shard, report)
        return report

    def _check_files(self, shard: Shard, report: ShardReport) -> bool:
        """Whether there is something to read samples from."""
        present = [file for file in (shard.zipped, shard.raw) if file is not None and file.path.is_file()]
        if not present:
            report.findings.add("file", Finding("", self._name(shard.zipped or shard.raw), "is missing"))
            return False
        try:
            raw = shard.read_raw() if shard.raw not in present else None
            for file in present:
                self._check_file(file, report)
            if raw is not None and (wrong := _difference(shard.raw, len(raw), hashlib.sha256(raw).hexdigest())):
                report.findings.add("file", Finding("", shard.name, f"decompressed, {wrong}"))
            head = raw[:4] if raw is not None else _head(shard.raw.path)
        except (HiveError, OSError) as error:
            report.findings.add("file", Finding("", shard.name, str(error)))
            return False
        samples = int.from_bytes(head, "little")
        if samples != shard.samples:
            reason = f"holds {samples} samples, index.json says {shard.samples}"
            report.findings.add("index", Finding("", shard.name, reason))
        return True

    def _check_file(self, file: ShardFile, report: ShardReport) -> None:
        report.unhashed += "sha256" not in file.hashes
        digest = hashlib.sha256()
        with file.path.open("rb") as opened:
            while block := opened.read(READ_AT_ONCE):
                digest.update(block)
        if wrong := _difference(file, file.path.stat().st_size, digest.hexdigest()):
            report.findings.add("file", Finding("", self._name(file), wrong))

    def _name(self, file: ShardFile) -> str:
        return str(file.path.relative_to(self.shards.folder))

    def _check_sample(self, index: int, shard: Shard, report: ShardReport) -> None:
        name = f"number {index}"
        try:
            columns = self.shards.columns(index)
            name = repr(columns["id"])
            report.numbers.append(index)
            report.id_hashes.append(hash_id(columns["id"]))
            sample = sample_from(columns, index)
        except HiveError as error:
            report.findings.add("sample", Finding(name, shard.name, str(error)))
            return
        if sample.id != sample.id.strip() or not sample.id.isprintable():
            report.findings.add("id", Finding(name, shard.name, "odd id"))
        for place, image in enumerate(sample.images):
            try:
                decode_image(image)
            except HiveError as error:
                report.findings.add("image", Finding(name, shard.name, f"image {place}: {error}"))
        size = sample_size(sample)
        if self._sizes is not None and tuple(self._sizes[index].tolist()) != size:
            reason = f"{SIZES} says {self._sizes[index].tolist()}, expected {list(size)} (characters, images)"
            report.findings.add("sizes", Finding(name, shard.name, reason))
        report.images += len(sample.images)
        report.characters.append(sum(len(turn.content) for turn in sample.turns))
        self._count_tokens(sample, report.tokens)

    def _count_tokens(self, sample: Sample, counts: TokenCounts) -> None:
        if self._tokenizer is None or self._settings is None:
            return
        text = report_text(sample, self._tokenizer, self._settings)
        counts.lossless += text.lossless
        if text.kept is None:
            counts.refuse(kind_of(text.reason), 1, f"sample {sample.id!r}: {text.reason}")
            return
        counts.lengths.append(len(text.kept.input_ids))
        counts.supervised += supervised(text.kept.labels)
        counts.cut += text.kept.cut


def hash_id(id: object) -> int:
    """64 bits of an id: two of a million differing ids share them once in 30 million folders."""
    return int.from_bytes(hashlib.blake2b(repr(id).encode(), digest_size=8).digest(), "little")


def _difference(file: ShardFile, size: int, digest: str) -> str:
    """How a file differs from what is listed; empty where it does not."""
    if size != file.bytes:
        return f"has {size} bytes, index.json says {file.bytes}"
    listed = file.hashes.get("sha256", digest)
    return "" if digest == listed else f"has sha256 {digest[:12]}..., index.json says {listed[:12]}..."


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(4)


def check_shards(folder: Path, settings: TextSettings | None, workers: int) -> Generator[ShardReport, None, None]:
    """Yield the report of every shard, in order, made by ``workers`` processes (0 or 1: this one).

    HiveError where a process dies.
    """
    checker = ShardChecker(folder, settings)
    numbers = range(len(checker.shards.shards))
    if workers <= 1:
        yield from map(checker.check, numbers)
        return
    # Spawned, not forked: torch and the tokenizers have threads, which a fork would copy in the middle of something.
    with process_pool(workers, "spawn", _start, folder, settings) as submit:
        reports = deque(submit(_check_in_worker, number) for number in numbers)
        try:
            while reports:
                yield reports.popleft().result()
        except BrokenProcessPool as error:
            raise HiveError(f"one of {workers} processes died (out of memory?); try fewer with --workers") from error


_checkers: list[ShardChecker] = []
"""The one of a worker process."""


def _start(folder: Path, settings: TextSettings | None) -> None:
    _checkers.append(ShardChecker(folder, settings))


def _check_in_worker(number: int) -> ShardReport:
    return _checkers[0].check(number)
