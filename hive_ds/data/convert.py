"""Any source -> a folder of MDS shards, with the samples that could not be used listed beside them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from hive_ds.data.sources import LlavaSource, Source
from hive_ds.errors import HiveError

REJECTS = "rejects.jsonl"
SUMMARY = "summary.json"


@dataclass(frozen=True)
class ConversionSummary:
    """What a conversion wrote; also in ``summary.json`` of the folder."""

    folder: str
    samples: int
    rejected: int
    images: int
    image_bytes: int

    def __str__(self) -> str:
        listed = f", listed in {Path(self.folder) / REJECTS}" if self.rejected else ""
        images = f"{self.images} images ({self.image_bytes / 1e6:.1f} MB)"
        return f"{self.folder}: {self.samples} samples, {images}; {self.rejected} rejected{listed}"


def convert(source: Source, out: str | Path) -> ConversionSummary:
    """Write every readable sample of ``source`` to MDS shards in the new folder ``out``.

    Every image is decoded once; the stored bytes are the file's own. ``rejects.jsonl`` names each sample left out
    and why. The folder appears whole or not at all. HiveError where ``out`` is not empty or nothing is readable.
    """
    from hive_ds.data.mds import MdsFolderWriter

    images, image_bytes, rejects = 0, 0, []
    with MdsFolderWriter(out) as writer:
        for entry in tqdm(source, total=len(source), desc="convert", unit="sample", disable=None):
            try:
                sample = entry.read()
            except HiveError as error:
                rejects.append({"id": entry.id, "reason": str(error)})
                continue
            writer.write(sample)
            images += len(sample.images)
            image_bytes += sum(map(len, sample.images))
        if rejects and not writer.num_samples:
            first = rejects[0]
            raise HiveError(f"all {len(rejects)} samples were rejected; the first, {first['id']}: {first['reason']}")
        summary = ConversionSummary(str(out), writer.num_samples, len(rejects), images, image_bytes)
        (writer.aside / REJECTS).write_text("".join(json.dumps(reject) + "\n" for reject in rejects))
        (writer.aside / SUMMARY).write_text(json.dumps(asdict(summary), indent=2) + "\n")
    return summary


def convert_llava(json_path: str | Path, image_folder: str | Path, out: str | Path) -> ConversionSummary:
    """Convert a LLaVA JSON file and its image folder; see `LlavaSource` and `convert`."""
    return convert(LlavaSource(json_path, image_folder), out)
