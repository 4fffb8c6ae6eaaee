"""Any source -> a folder of MDS shards, by several processes, restartable, with what could not be used listed beside.

A conversion is cut into parts of equal numbers of samples. Each part is written by one process and appears whole; a
record says that it is done. So the output depends on the source and the options alone: not on the number of
processes, and not on how often the conversion was killed and started again.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Generator, Iterator
from concurrent.futures import as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from hive_ds.children import process_pool
from hive_ds.data.convert_options import REJECTS, SUMMARY, ConversionSummary, ConvertOptions, read_captions
from hive_ds.data.convert_part import PartJob, PartReport, convert_part, read_record, source_name
from hive_ds.data.sources import Source
from hive_ds.errors import HiveError, told_as
from hive_ds.files import write_whole

PLAN = "plan.json"
LOCK_SECONDS = 20.0
"""How long a conversion waits for the processes of one that was killed to notice."""


def convert(source: Source, out: str | Path, options: ConvertOptions | None = None) -> ConversionSummary:
    """Convert ``source`` to MDS shards in ``out``, a new folder or a URL (s3://, gs://, ...).

    Every image is decoded once. Samples that cannot be used are left out and named in ``rejects.jsonl``. A conversion
    that was stopped goes on where it was, given the same source and options; one that too many rejects stopped reads
    those again. What is done so far lies in a hidden folder beside a local ``out``; for a URL, in the current folder.

    Raises:
        HiveError: ``source`` holds no sample, ``out`` is not empty or a URL of shards, another conversion writes it, it
            was begun with other options, too many samples are rejected, or none is left.
    """
    from hive_ds.data.mds.parts import check_compression, check_remote, holds_index

    options = options or ConvertOptions()
    check_compression(options.compression)
    remote = str(out).rstrip("/") if "://" in str(out) else None
    if remote is not None:
        check_remote(remote)
    elif Path(out).is_symlink():  # stays one
        out = os.path.realpath(out)
    work = _work_folder(out, remote)
    finished = _finished(Path(out), work) if remote is None else None
    if finished is not None:
        return finished
    order = _order(len(source), options)
    if not len(order):
        raise HiveError(f"source {source.origin['source']}: holds no sample")
    captions = None if options.captions is None else read_captions(options.captions)
    if remote is not None and not (work / PLAN).is_file() and holds_index(remote):
        raise HiveError(f"output {out}: is a folder of shards already; name a new one or remove it")
    work.mkdir(parents=True, exist_ok=True)
    with _locked(work):
        _check_plan(work, _plan(source, order, options))
        for name in ("out", "records"):
            (work / name).mkdir(exist_ok=True)
        _read_rejects_again(work)
        repeats = {} if captions is None else _repeats(source)
        job = PartJob(
            source, order, options.part_size, work, options.images, options.compression, captions, repeats, remote
        )
        seconds = _convert_parts(job, options)
        summary = replace(_finish(job, options), seconds=seconds)
        if remote is None:
            if Path(out).exists():
                Path(out).rmdir()
            (work / "out").rename(out)
        else:
            _publish_remote(work / "out", remote)
    shutil.rmtree(work)
    return summary


def _work_folder(out: str | Path, remote: str | None) -> Path:
    if remote is not None:
        return Path(f".hive-ds-convert-{hashlib.sha256(remote.encode()).hexdigest()[:12]}").absolute()
    return Path(out).absolute().with_name(f".{Path(out).absolute().name}.partial")


def _finished(out: Path, work: Path) -> ConversionSummary | None:
    """The summary of a conversion that was killed after its last step; HiveError where ``out`` holds anything else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    # ``work`` may be removed in part already; it goes last, and no conversion makes it where ``out`` holds anything.
    if work.is_dir() and not (work / "out").exists() and (out / SUMMARY).is_file():
        with told_as(str(out / SUMMARY), "the summary of a conversion"):
            summary = ConversionSummary(**json.loads((out / SUMMARY).read_text()))
        shutil.rmtree(work)
        return summary
    raise HiveError(f"output {out}: exists and is not an empty folder; name a new one or remove it")


def _order(count: int, options: ConvertOptions) -> Any:
    order = np.arange(count)
    if options.shuffle_seed is not None:
        order = np.random.default_rng(options.shuffle_seed).permutation(count)
    return order[: options.limit]


def _repeats(source: Source) -> dict[int, int]:
    """Of every sample whose id an earlier one has: its number, and that of the first."""
    firsts: dict[str, int] = {}
    ids = ((index, source_name(source, index)) for index in range(len(source)))
    return {index: firsts[id] for index, id in ids if firsts.setdefault(id, index) != index}


def _plan(source: Source, order: Any, options: ConvertOptions) -> dict[str, Any]:
    """What a conversion must not differ in when it goes on: all that decides its output."""
    chosen = {name: value for name, value in asdict(options).items() if name not in ("workers", "max_reject_share")}
    if options.captions is not None:
        chosen["captions"] = hashlib.sha256(options.captions.read_bytes()).hexdigest()
    ends = [source.sample_id(int(order[at])) for at in (0, -1)] if len(order) else []
    plan = {**source.origin, **chosen, "samples": len(order), "first and last sample": ends}
    return dict(json.loads(json.dumps(plan)))


@contextmanager
def _locked(work: Path) -> Iterator[None]:
    """Hold the folder for this conversion. Its processes inherit the lock: the last of a killed run lets it go."""
    with (work / "lock").open("w") as lock:
        deadline = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise HiveError(f"output: another conversion is writing it (it holds {work / 'lock'})") from None
                time.sleep(0.1)
        yield


def _check_plan(work: Path, plan: dict[str, Any]) -> None:
    path = work / PLAN
    if not path.is_file():
        write_whole(path, json.dumps(plan, indent=2))
        return
    with told_as(str(path), f"the plan of a conversion begun there; remove {work} to start anew"):
        begun = dict(json.loads(path.read_text()))
    for name, value in plan.items():
        if begun.get(name) != value:
            raise HiveError(
                f"output: a conversion was begun there with {name} {begun.get(name)!r}, not {value!r}; give the same "
                f"options to go on, or remove {work} to start anew"
            )


def _convert_parts(job: PartJob, options: ConvertOptions) -> dict[str, float]:
    """Convert the parts that have no record yet; processor time spent on images."""
    shutil.rmtree(job.work / "writing", ignore_errors=True)
    done = [number for number in range(job.num_parts) if job.record(number).is_file()]
    todo = sorted(set(range(job.num_parts)) - set(done))
    rejected = sum(len(job.read_record(number)["rejects"]) for number in done)
    finished = sum(len(job.samples(number)) for number in done)
    seconds = {"decode": 0.0, "encode": 0.0}
    total = len(job.order)
    bar = tqdm(total=total, initial=finished, desc="convert", unit="sample", disable=None)
    with bar as progress, closing(_reports(job, todo, options.workers)) as reports:
        for report in reports:
            progress.update(report.samples + report.rejected)
            rejected += report.rejected
            for name, value in report.seconds.items():
                seconds[name] += value
            took = {f"{name} s": f"{value:.0f}" for name, value in seconds.items()}
            progress.set_postfix({"rejected": rejected, **took})
            _check_rejects(job, rejected, options)
    return seconds


def _reports(job: PartJob, todo: list[int], workers: int) -> Generator[PartReport, None, None]:
    if workers == 1 or len(todo) < 2:
        yield from (convert_part(job, number) for number in todo)
        return
    # Forked, so that source and job are shared and not sent. A part appears whole or not at all: nobody waits for one.
    with process_pool(min(workers, len(todo)), "fork", _shared.append, job) as submit:
        try:
            for future in as_completed([submit(_convert_shared, number) for number in todo]):
                yield future.result()
        except BrokenProcessPool:
            raise HiveError(
                "a process of the conversion was killed (perhaps out of memory); what is done stays: run the same "
                "command to go on, with fewer --workers if memory was short"
            ) from None


_shared: list[PartJob] = []
"""The job, in the processes that work on it."""


def _convert_shared(number: int) -> PartReport:
    return convert_part(_shared[0], number)


def _check_rejects(job: PartJob, rejected: int, options: ConvertOptions) -> None:
    """HiveError, and a list of the rejects, where they are too many or nothing else is left."""
    if rejected <= options.max_reject_share * len(job.order) and rejected < len(job.order):
        return
    done = (job.read_record(number) for number in range(job.num_parts) if job.record(number).is_file())
    rejects = [reject for record in done for reject in record["rejects"]]
    _write_rejects(job.work, rejects)
    first = rejects[0]
    share = f"more than the share of {options.max_reject_share} that is allowed"
    if rejected == len(job.order):
        share = "so none is left to write"
    raise HiveError(
        f"{rejected} of {len(job.order)} samples were rejected, {share}; the first, {first['id']}: {first['reason']}. "
        f"All are in {job.work / REJECTS}; the same command, also with a larger --max-reject-share, reads them again "
        f"and goes on; to give other options, remove {job.work} first"
    )


def _write_rejects(folder: Path, rejects: list[dict[str, Any]]) -> None:
    (folder / REJECTS).write_text("".join(json.dumps(reject) + "\n" for reject in rejects))


def _read_rejects_again(work: Path) -> None:
    """Forget the parts that have rejects, where a start stopped because of them: what was missing may be there now."""
    if not (work / REJECTS).is_file():
        return
    for record in (work / "records").glob("part-*.json"):
        if read_record(record)["rejects"]:
            record.unlink()
    (work / REJECTS).unlink()


def _finish(job: PartJob, options: ConvertOptions) -> ConversionSummary:
    """Join what the records say into the files beside the shards."""
    from hive_ds.data.mds.parts import write_index
    from hive_ds.data.mds.sizes import write_sizes

    records = [job.read_record(number) for number in range(job.num_parts)]
    rejects = [reject for record in records for reject in record["rejects"]]
    counted = ("samples", "images", "image_bytes", "source_image_bytes")
    sums = {name: sum(record[name] for record in records) for name in counted}
    summary = ConversionSummary(rejected=len(rejects), **sums)
    _check_rejects(job, len(rejects), options)
    out = job.work / "out"
    write_sizes(out, [size for record in records for size in record["sizes"]])
    _write_rejects(out, rejects)
    (out / SUMMARY).write_text(summary.to_json())
    write_index(out, [shard for record in records for shard in record["shards"]])
    return summary


def _publish_remote(out: Path, remote: str) -> None:
    """Upload the files beside the shards; the index last, since it makes the folder one."""
    from hive_ds.data.mds.index import INDEX
    from hive_ds.data.mds.parts import upload
    from hive_ds.data.mds.sizes import SIZES

    upload(out, [SIZES, REJECTS, SUMMARY, INDEX], remote)
