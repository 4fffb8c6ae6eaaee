"""Gradient maps over the picture that they are about, one panel for each block of the vision encoder."""

from __future__ import annotations

from dataclasses import dataclass
from textwrap import shorten
from typing import Any

import numpy as np
from PIL import Image

from hive_ds.analysis.attention_pictures import (
    GAP,
    PANEL,
    Scale,
    add_colour_bar,
    blank_figure,
    fitted,
    heat_over,
    pale,
    rendered,
    seen_part,
)
from hive_ds.analysis.block_gradients import BlockGradients, block_gradients
from hive_ds.analysis.samples import Subject, picture_of
from hive_ds.data.batch import PackedBatch
from hive_ds.data.schema import Sample

COLUMNS = 6
CAPTION = 56
"""Height in pixels of what stands above a panel."""
LONGEST_READER, LONGEST_TEXT = 28, 70
"""Characters in a caption, and of the supervised text in the title."""
NO_GRADIENT = "no gradient"


@dataclass(frozen=True)
class GradientMaps:
    """Gradients of one sample at every block.

    Attributes:
        subject: the model.
        sample: with one image.
        batch: the sample alone.
        gradients: of its loss.
    """

    subject: Subject
    sample: Sample
    batch: PackedBatch
    gradients: BlockGradients

    def values(self) -> dict[str, Any]:
        """What there is to know, for JSON: loss, supervised tokens, and by block its readers, norm and map."""
        maps, norms = self.gradients.on_patches(0), self.gradients.norms()
        return {
            "checkpoint": self.subject.name,
            "template": self.subject.template,
            "loss": self.gradients.loss,
            "supervised_tokens": self.subject.supervised(self.batch),
            "blocks": [
                {
                    "block": block,
                    "read_by": self.subject.read_by(block),
                    "norm": norms.get(block),
                    "map": maps[block].tolist() if block in maps else None,
                }
                for block in range(1, self.subject.num_blocks + 1)
            ],
        }

    def lines(self) -> list[str]:
        """The same for people, without the maps."""
        said, norms = self.subject.supervised(self.batch), self.gradients.norms()
        lines = [f"loss {self.gradients.loss:.4f} over {len(said)} supervised tokens: {' '.join(said)}"]
        lines.append(f"{'block':<7}{'read by':<16}norm of the gradient at its output")
        for block in range(1, self.subject.num_blocks + 1):
            norm = f"{norms[block]:.4g}" if block in norms else NO_GRADIENT
            lines.append(f"{block:<7}{self.subject.read_by(block):<16}{norm}")
        return lines

    def figure(self, *, per_panel: bool = False) -> Image.Image:
        """The picture, then a panel for each block.

        Args:
            per_panel: give each panel a scale of its own. It shows where each is sensitive, but hides how much; by
                default one scale is shared by all panels and drawn beside them.
        """
        seen = seen_part(picture_of(self.sample), self.subject.processor.image_processor)
        picture = fitted(seen, PANEL)
        maps, norms = self.gradients.on_patches(0), self.gradients.norms()
        shared = Scale.of(maps.values())
        panels = [("the picture", picture)]
        for block in range(1, self.subject.num_blocks + 1):
            reader = shorten(self.subject.read_by(block), LONGEST_READER, placeholder=" …")
            name = f"block {block}" + (f"\n→ {reader}" if reader else "")
            if block in maps:
                end = (Scale.of([maps[block]]) if per_panel else shared).end
                panels.append((f"{name}\nnorm {norms[block]:.3g}", heat_over(picture, maps[block], end)))
            else:
                panels.append((f"{name}\n{NO_GRADIENT}", pale(picture)))
        said = shorten(" ".join(self.subject.supervised(self.batch)), LONGEST_TEXT, placeholder=" …")
        title = f"{self.subject.name}: gradient of the loss, {self.gradients.loss:.2f}, of “{said}”"
        return _panel_figure(panels, title, None if per_panel else shared)


def gradient_maps(subject: Subject, sample: Sample) -> GradientMaps:
    """Gradients of ``sample``'s loss at every block.

    Raises:
        HiveError: the sample has not one image, or does not fit the model.
    """
    batch = subject.pictured(sample)
    inputs = batch.model_inputs(subject.model.device, subject.model.dtype)
    return GradientMaps(subject, sample, batch, block_gradients(subject.model, inputs))


def _panel_figure(panels: list[tuple[str, Image.Image]], title: str, scale: Scale | None) -> Image.Image:
    """Panels with captions, in rows of `COLUMNS`; the scale beside them where there is one for all."""
    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    step, down = PANEL + 2 * GAP, PANEL + CAPTION
    left, right, top, bottom = 14, 120 if scale is not None else 14, 40, 10
    width, height = left + columns * step + right, top + rows * down + bottom
    figure = blank_figure(width, height)
    figure.text(0.5, 1 - 20 / height, title, ha="center", va="center", fontsize=11, parse_math=False, wrap=True)
    for place, (caption, panel) in enumerate(panels):
        row, column = divmod(place, columns)
        x = left + column * step + (PANEL - panel.width) // 2
        y = height - top - CAPTION - row * down - panel.height
        axes = figure.add_axes((x / width, y / height, panel.width / width, panel.height / height))
        axes.set_axis_off()
        figure.figimage(np.asarray(panel), x, y, cmap="gray", vmin=0, vmax=255)  # pixel by pixel, too
        axes.set_title(caption, fontsize=9, pad=4)
    if scale is not None:
        long = min(rows * down - CAPTION, 2 * PANEL)
        place_of_bar = (left + columns * step + 6, height - top - CAPTION - long, 14, long)
        add_colour_bar(figure, place_of_bar, scale, "gradient norm at a patch")
    return rendered(figure)
