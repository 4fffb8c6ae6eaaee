"""Folders of small shards, sound or not, as conversion by parts writes them."""

from __future__ import annotations

import json
from pathlib import Path

from streaming import MDSWriter

from hive_ds.data.mds.sizes import sample_size, write_sizes
from hive_ds.data.schema import MDS_COLUMNS, Sample, to_columns


def write_columns(folder: Path, rows: list[dict], **options: object) -> None:
    """Shards of any columns, which the schema may refuse, of a few samples each, in one folder for each half."""
    entries = []
    for part, chosen in (("part-0", rows[: len(rows) // 2]), ("part-1", rows[len(rows) // 2 :])):
        with MDSWriter(
            columns=MDS_COLUMNS, out=str(folder / part), size_limit=1000, hashes=["sha256"], **options
        ) as to:
            for row in chosen:
                to.write(row)
        index = json.loads((folder / part / "index.json").read_text())
        (folder / part / "index.json").unlink()
        for entry in index["shards"]:
            for kind in ("raw_data", "zip_data"):
                if entry[kind]:
                    entry[kind]["basename"] = f"{part}/{entry[kind]['basename']}"
            entries.append(entry)
    (folder / "index.json").write_text(json.dumps({"version": 2, "shards": entries}))


def write_samples(folder: Path, samples: list[Sample], **options: object) -> None:
    write_columns(folder, [to_columns(sample) for sample in samples], **options)
    write_sizes(folder, [sample_size(sample) for sample in samples])
