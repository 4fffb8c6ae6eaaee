"""Is a folder of shards sound? Every file, every sample, every image, and what a tokenizer makes of the text."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from hive_ds.config import DataConfig
from hive_ds.data.inspection.findings import NAMED, Finding, Findings
from hive_ds.data.inspection.shards import TokenCounts, check_shards
from hive_ds.data.inspection.text import TextSettings
from hive_ds.data.mds.reading import ShardFolder, open_folder
from hive_ds.data.mds.sizes import SIZES, read_sizes
from hive_ds.errors import HiveError


@dataclass
class VerifyReport:
    """What `verify` found; ``str()`` of it is the report."""

    folder: Path
    settings: TextSettings | None
    samples: int
    shards: int
    bytes: int
    images: int = 0
    characters: list[int] = field(default_factory=list)
    findings: Findings = field(default_factory=Findings)
    warnings: list[str] = field(default_factory=list)
    tokens: TokenCounts = field(default_factory=TokenCounts)

    @property
    def refused(self) -> int:
        """Samples that the tokenizer and template cannot use."""
        return sum(count for count, _ in self.tokens.refused.values())

    @property
    def too_many_refused(self) -> bool:
        """Whether training would stop for them (`DataConfig.max_bad_share`)."""
        return self.refused > DataConfig.max_bad_share * self.samples

    @property
    def sound(self) -> bool:
        """Whether training can rely on the folder."""
        return not self.findings.counts and not self.too_many_refused

    def __str__(self) -> str:
        size = f"{self.samples} samples in {self.shards} shards ({self.bytes / 1e6:.1f} MB), {self.images} images"
        lines = [f"{self.folder}: {size}"]
        if self.characters:
            lines.append(f"text: {_spread(self.characters)} characters a sample")
        if self.settings:
            lines += self._token_lines(self.settings)
        lines += [f"warning: {warning}" for warning in self.warnings]
        lines += self.findings.lines()
        faults = sum(self.findings.counts.values())
        if self.sound:
            folder = shlex.quote(str(self.folder))
            train = f"training reads it with data.train={folder}"
            lines.append(f"SOUND: {train}; look at samples with: hive-ds data show {folder} samples.html")
        elif faults:
            lines.append(
                f"NOT SOUND: {faults} faults; convert the data again, or copy the shards again from a good copy"
            )
        else:
            lines.append("NOT SOUND: training would stop for the samples it cannot use; see the reasons above")
        return "\n".join(lines)

    def _token_lines(self, settings: TextSettings) -> list[str]:
        lines, tokens = [f"tokens ({settings}):"], self.tokens
        if tokens.lengths:
            share = 100 * tokens.supervised / sum(tokens.lengths)
            lines.append(f"  {_spread(tokens.lengths)} tokens a sample; {share:.1f} % of them carry loss")
        lines.append(f"  {tokens.cut} texts are cut at {settings.max_length} tokens")
        if tokens.lossless:
            lines.append(f"  warning: {tokens.lossless} samples carry no loss at all")
        if self.refused:
            lines += self._refusal_lines()
        return lines

    def _refusal_lines(self) -> list[str]:
        word = "FAULT" if self.too_many_refused else "warning"
        allowed = f"training lets {100 * DataConfig.max_bad_share:g} % pass"
        lines = [
            f"  {word}: {self.refused} samples cannot be used ({100 * self.refused / self.samples:.2f} %; {allowed}):"
        ]
        reasons = sorted(self.tokens.refused.items(), key=lambda item: (-item[1][0], item[0]))
        lines += [f"    {count} x {kind}; first: {example}" for kind, (count, example) in reasons[:NAMED]]
        return lines + [f"    and {len(reasons) - NAMED} more reasons"] * (len(reasons) > NAMED)


def _spread(values: Sequence[int]) -> str:
    return f"{min(values)} to {max(values)} (median {np.median(values):g})"


def verify(folder: str | Path, settings: TextSettings | None = None, *, workers: int = 1) -> VerifyReport:
    """Check a local folder of shards whole, with ``workers`` processes; nothing is written.

    A folder whose index cannot be read is a finding, not an error; HiveError where there is no folder.
    """
    root = Path(folder)
    if not root.is_dir():
        raise HiveError(f"data folder {folder}: does not exist")
    try:
        shards = open_folder(root)
    except HiveError as error:
        report = VerifyReport(root, None, 0, 0, 0)
        report.findings.add("index", Finding("", "index.json", str(error)))
        return report
    listed = [file for shard in shards.shards for file in (shard.raw, shard.zipped) if file and file.path.is_file()]
    size = sum(file.path.stat().st_size for file in listed)
    report = VerifyReport(root, settings, len(shards), len(shards.shards), size)
    _check_folder(shards, report)
    _check_samples(shards, report, workers)
    return report


def _check_folder(shards: ShardFolder, report: VerifyReport) -> None:
    """What concerns the folder as a whole."""
    root = report.folder
    if not len(shards):
        report.findings.add("index", Finding("", "index.json", "lists no samples"))
    listed = {file.path for shard in shards.shards for file in (shard.raw, shard.zipped) if file}
    for path in sorted(path for path in root.rglob("*.mds*") if path not in listed and path.is_file()):
        report.findings.add("index", Finding("", str(path.relative_to(root)), "is not listed in index.json"))
    if not (root / SIZES).is_file():
        report.warnings.append(f"there is no {SIZES}, which batches of equal work need")
        return
    try:
        read_sizes(root, len(shards))
    except HiveError as error:
        report.findings.add("sizes", Finding("", SIZES, str(error)))


def _check_samples(shards: ShardFolder, report: VerifyReport, workers: int) -> None:
    numbers, hashes = np.empty(len(shards), np.int64), np.empty(len(shards), np.uint64)
    read, unhashed = 0, 0
    bar = tqdm(total=len(shards), desc="verify", unit="sample", disable=None)
    with bar, closing(check_shards(report.folder, report.settings, workers)) as reports:
        for shard, found in zip(shards.shards, reports, strict=True):
            report.findings.merge(found.findings)
            report.images += found.images
            report.characters += found.characters
            unhashed += found.unhashed
            _add_tokens(report.tokens, found.tokens)
            numbers[read : read + len(found.numbers)] = found.numbers
            hashes[read : read + len(found.numbers)] = found.id_hashes
            read += len(found.numbers)
            bar.update(shard.samples)
    if unhashed:
        report.warnings.append(f"{unhashed} shard files have no sha256 in index.json, so flipped bytes may go unseen")
    _warn_of_repeats(shards, numbers[:read], hashes[:read], report.warnings)


def _add_tokens(counts: TokenCounts, more: TokenCounts) -> None:
    counts.lengths += more.lengths
    counts.supervised += more.supervised
    counts.cut += more.cut
    counts.lossless += more.lossless
    for kind, (count, example) in more.refused.items():
        counts.refuse(kind, count, example)


def _warn_of_repeats(shards: ShardFolder, numbers: np.ndarray, hashes: np.ndarray, warnings: list[str]) -> None:
    """Count samples whose id an earlier one has.

    No fault: training goes by number. LLaVA's own files give one id to all conversations about a picture.
    """
    order = np.argsort(hashes, kind="stable")  # stable: equal ids stay in the order of their samples
    ordered = hashes[order]
    repeats = np.flatnonzero(ordered[1:] == ordered[:-1]) + 1
    firsts = np.searchsorted(ordered, ordered[repeats])
    if not len(repeats):
        return
    number, first = min(zip(numbers[order[repeats]].tolist(), numbers[order[firsts]].tolist(), strict=True))
    warnings.append(
        f"{len(repeats)} samples have the id of an earlier one; the first is number {number}, "
        f"{shards.columns(number)['id']!r}, as number {first}. Messages cannot tell them apart, and hive-ds data "
        "recaption gives them one caption"
    )
