"""Attention of every text token on the picture, at every layer that sees it: the paper's figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from PIL import Image

from hive_ds.analysis.attention_maps import token_attention_maps
from hive_ds.analysis.attention_pictures import (
    GAP,
    LEFT,
    PANEL,
    RIGHT,
    Row,
    attention_figure,
    blank_figure,
    rendered,
    seen_part,
    shared_scale,
)
from hive_ds.analysis.maps import AttentionMaps
from hive_ds.analysis.samples import Subject, picture_of
from hive_ds.data.batch import PackedBatch
from hive_ds.data.schema import Sample

MOST_TOKENS = 64
"""Rows of a figure."""
MOST_LAYERS = 8
"""Columns of a figure; a model with more layers that see images shows as many, evenly spread."""
LONGEST_NAME = 14
"""Characters of a token beside a panel."""
TITLE = 44
"""Pixels."""


@dataclass(frozen=True)
class TokenMaps:
    """Attention of one sample's text.

    Attributes:
        subject: the model.
        sample: with one image.
        batch: the sample alone.
        maps: of its tokens.
        head: whose; None is the mean over heads.
    """

    subject: Subject
    sample: Sample
    batch: PackedBatch
    maps: AttentionMaps
    head: int | None

    def values(self) -> dict[str, Any]:
        """For JSON: tokens, and by layer the share of each token's attention on the picture, and its map."""
        return {
            "checkpoint": self.subject.name,
            "head": self.head,
            "tokens": self.subject.token_names(self.batch),
            "image_offset": self.batch.image_offsets[0][0],
            "layers": [
                {
                    "layer": layer.layer,
                    "blocks": list(layer.blocks),
                    "on_picture": layer.on_patches(0).sum((1, 2)).tolist(),
                    "maps": layer.on_patches(0).tolist(),
                }
                for layer in self.maps.layers
            ],
        }

    def lines(self) -> list[str]:
        """For people: the share of each token's attention that lies on the picture, by layer."""
        shares = [layer.on_patches(0).sum((1, 2)).tolist() for layer in self.maps.layers]
        names = self.subject.token_names(self.batch)
        head = "".join(f"{f'layer {layer.layer}':>10}" for layer in self.maps.layers)
        lines = [f"{'share of attention on the picture':<34}{head}"]
        for token in range(self.batch.image_offsets[0][0], len(names)):
            lines.append(f"{names[token]:<34}" + "".join(f"{share[token]:>10.1%}" for share in shares))
        return lines

    def rows(self) -> list[Row]:
        """A row for every token that sees the picture, called after it and the one that it predicts."""
        names = [_short(name) for name in self.subject.token_names(self.batch)]
        labels = [*(f"{name}\n→ {following}" for name, following in pairwise(names)), names[-1]]
        rows = [Row(label, [token]) for token, label in enumerate(labels)]
        return rows[self.batch.image_offsets[0][0] :]

    def figure(self, *, per_panel: bool = False) -> Image.Image:
        """Rows tokens, columns layers; long texts go on beside the first ones.

        Args:
            per_panel: a scale of its own for each panel, not one for all.
        """
        rows, maps = self.rows()[:MOST_TOKENS], replace(self.maps, layers=_spread(self.maps.layers))
        seen = seen_part(picture_of(self.sample), self.subject.processor.image_processor)
        scale = shared_scale(maps, rows)
        groups = _groups(len(rows), len(maps.layers))
        size = -(-len(rows) // groups)
        parts = [
            attention_figure(maps, rows[start : start + size], [seen], per_panel=per_panel, scale=scale)
            for start in range(0, len(rows), size)
        ]
        return _side_by_side(parts, self._title(len(rows)))

    def _title(self, shown: int) -> str:
        heads = "mean over heads" if self.head is None else f"head {self.head}"
        title = f"{self.subject.name}: attention of each token (→ the one that it predicts) on the picture, {heads}"
        left_out = [f"first {shown} of {len(self.rows())} tokens"] if shown < len(self.rows()) else []
        if len(self.maps.layers) > MOST_LAYERS:
            left_out.append(f"{MOST_LAYERS} of {len(self.maps.layers)} layers")
        return title + (f" ({', '.join(left_out)})" if left_out else "")


def token_maps(subject: Subject, sample: Sample, *, head: int | None = None) -> TokenMaps:
    """Attention of every token of ``sample``'s text.

    Raises:
        HiveError: the sample has not one image or does not fit the model, or there is no such head.
    """
    batch = subject.pictured(sample)
    inputs = batch.model_inputs(subject.model.device, subject.model.dtype)
    pixels = {name: inputs[name] for name in batch.images}
    maps = token_attention_maps(subject.model, inputs["input_ids"][None], batch.image_offsets[0], pixels, head=head)
    return TokenMaps(subject, sample, batch, maps, head)


def _short(name: str) -> str:
    """A name that fits beside a panel."""
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…"


def _spread(layers: Sequence[Any]) -> list[Any]:
    """At most `MOST_LAYERS` of them, the first and the last among them."""
    if len(layers) <= MOST_LAYERS:
        return list(layers)
    return [layers[round(place * (len(layers) - 1) / (MOST_LAYERS - 1))] for place in range(MOST_LAYERS)]


def _groups(rows: int, columns: int) -> int:
    """How many groups of rows, side by side, make the figure most nearly square."""
    step = PANEL + GAP

    def longer_side(groups: int) -> int:
        return max(groups * (LEFT + columns * step + RIGHT), -(-rows // groups) * step)

    return min(range(1, rows + 1), key=longer_side)


def _side_by_side(parts: Sequence[Image.Image], title: str) -> Image.Image:
    width, height = sum(part.width for part in parts), max(part.height for part in parts)
    strip = blank_figure(width, TITLE)
    strip.text(0.5, 0.5, title, ha="center", va="center", fontsize=12, parse_math=False, wrap=True)
    canvas = Image.new("RGB", (width, height + TITLE), "white")
    canvas.paste(rendered(strip), (0, 0))
    left = 0
    for part in parts:
        canvas.paste(part, (left, TITLE))
        left += part.width
    return canvas
