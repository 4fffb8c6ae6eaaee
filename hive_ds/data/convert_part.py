"""One part of a conversion: some samples of a source, read, checked and written by one process."""

from __future__ import annotations

import errno
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hive_ds.constants import IMAGE_TOKEN
from hive_ds.data.convert_images import ImageOptions, ImageStorer
from hive_ds.data.schema import Sample, Turn
from hive_ds.data.sources import Source
from hive_ds.errors import HiveError, one_line, told_as
from hive_ds.files import write_whole

REASON_LENGTH = 300
"""Characters of a reject's reason that are kept: a library's message may quote the whole file."""

MACHINE_ERRORS = (
    errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOTCONN, errno.ESTALE, errno.ETIMEDOUT,
)  # fmt: skip
"""Of reading: the disk, the network or the machine is at fault, not the file, which another try may read."""


@dataclass(frozen=True)
class PartJob:
    """What the processes of a conversion share; they are forked, so nothing of it is copied."""

    source: Source
    order: npt.NDArray[np.int64]
    """Numbers of the source's samples, in the order of the output."""
    part_size: int
    work: Path
    images: ImageOptions
    compression: str | None
    captions: Mapping[str, str] | None
    repeats: Mapping[int, int]
    """Where there are captions: numbers of the samples whose id an earlier one has, and of the first that has it."""
    remote: str | None

    @property
    def num_parts(self) -> int:
        """Parts of the whole conversion."""
        return -(-len(self.order) // self.part_size)

    def samples(self, number: int) -> npt.NDArray[np.int64]:
        """Numbers of the source's samples that part ``number`` holds."""
        return self.order[number * self.part_size : (number + 1) * self.part_size]

    def folder(self, number: int) -> Path:
        """Where the shards of a part lie in the end."""
        return self.work / "out" / f"part-{number:05d}"

    def record(self, number: int) -> Path:
        """The file that says a part is done, and what became of its samples."""
        return self.work / "records" / f"part-{number:05d}.json"

    def read_record(self, number: int) -> dict[str, Any]:
        """What the record of a part says."""
        return read_record(self.record(number))


def read_record(path: Path) -> dict[str, Any]:
    """What the file that says a part is done says of its samples."""
    with told_as(str(path), "the record of a part, as conversions leave it; remove it: the part is converted again"):
        record = dict(json.loads(path.read_text()))
        return {**record, "rejects": list(record["rejects"])}


@dataclass(frozen=True)
class PartReport:
    """What a part took: not recorded, since it differs from run to run."""

    samples: int
    rejected: int
    seconds: dict[str, float]


def convert_part(job: PartJob, number: int) -> PartReport:
    """Convert part ``number``: its shards appear whole, and its record after them.

    HiveError where the machine fails (`MACHINE_ERRORS`): that is no reject, which no later start would try again.
    """
    from hive_ds.data.mds.parts import PartWriter
    from hive_ds.data.mds.sizes import sample_size

    storer = ImageStorer(job.images)
    sizes: list[tuple[int, int]] = []
    bytes_in = bytes_out = 0
    rejects: list[dict[str, Any]] = []
    aside = job.work / "writing" / f"part-{number:05d}"
    with PartWriter(aside, job.folder(number), compression=job.compression, remote=job.remote) as writer:
        for index in map(int, job.samples(number)):
            try:
                found = _read(job, index)
                sample = replace(found, images=tuple(_stored(storer, at, x) for at, x in enumerate(found.images)))
            except Exception as error:  # a library's own error on a bad file must not lose the samples beside it
                name = source_name(job.source, index)
                if _is_of_machine(error):
                    raise HiveError(
                        f"sample {name}: {_reason(error)}. That is a fault of the disk or the machine; what is done "
                        "stays: run the same command to go on"
                    ) from error
                rejects.append({"index": index, "id": name, "reason": _reason(error)})
                continue
            writer.write(sample)
            sizes.append(sample_size(sample))
            bytes_in += sum(map(len, found.images))
            bytes_out += sum(map(len, sample.images))
    record = {
        "samples": len(sizes),
        "sizes": sizes,
        "rejects": rejects,
        "images": sum(images for _, images in sizes),
        "image_bytes": bytes_out,
        "source_image_bytes": bytes_in,
        "shards": writer.shards,
    }
    write_whole(job.record(number), json.dumps(record))
    return PartReport(len(sizes), len(rejects), storer.seconds)


def _read(job: PartJob, index: int) -> Sample:
    if job.captions is None:
        return job.source.read(index)
    id = job.source.sample_id(index)
    caption = job.captions.get(id)
    if caption is None:
        raise HiveError("the file of captions has none for it")
    images = job.source.images(index)
    if not images:
        raise HiveError("has no picture that its caption could be of")
    first = job.repeats.get(index)
    if first is not None and _images(job.source, first) != images:
        raise HiveError(
            f"has the id of number {first}, whose pictures are others or cannot be read, and so its caption; expected "
            "ids that differ"
        )
    return Sample(id, (Turn("user", IMAGE_TOKEN * len(images)), Turn("assistant", caption)), images)


def _images(source: Source, index: int) -> tuple[bytes, ...] | None:
    try:
        return source.images(index)
    except HiveError:
        return None


def _stored(storer: ImageStorer, at: int, data: bytes) -> bytes:
    try:
        return storer.store(data)
    except HiveError as error:
        raise HiveError(f"image {at}: {error}") from error


def _is_of_machine(error: BaseException | None) -> bool:
    """Whether ``error`` is one of `MACHINE_ERRORS`, or was raised from one."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in MACHINE_ERRORS:
            return True
        error = error.__cause__
    return False


def _reason(error: Exception) -> str:
    said = " ".join(str(error).split()) if isinstance(error, HiveError) else one_line(error)
    return said[:REASON_LENGTH]


def source_name(source: Source, index: int) -> str:
    """Id of sample ``index``, or its number where its row cannot be read."""
    try:
        return source.sample_id(index)
    except Exception:
        return f"number {index}"
