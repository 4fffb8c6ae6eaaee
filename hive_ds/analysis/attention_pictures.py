"""Attention maps over the pictures they are about: one panel, or a figure of tokens by layers."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from torch import Tensor

from hive_ds.analysis.maps import AttentionMaps, LayerMaps
from hive_ds.files import write_whole

COLOURS = "YlOrRd"
"""Pale to dark, as the picture below is light."""
PANEL = 160
"""Longer side of a panel in pixels."""
GAP = 6
LEFT, RIGHT = 130, 130
"""Pixels beside the panels, for names of rows and for the scale."""
DPI = 100


@dataclass(frozen=True)
class Row:
    """One row of a figure: the mean over text tokens (indices), and what it is called."""

    label: str
    tokens: Sequence[int]

    def on_patches(self, layer: LayerMaps, image: int) -> Tensor:
        """(rows, columns) of one image at one layer."""
        return layer.on_patches(image)[list(self.tokens)].mean(dim=0)


class Scale(NamedTuple):
    """Of the colours of a map."""

    end: float
    """The value from which on all have the darkest colour: the 99th percentile. One patch alone would pale the rest."""
    highest: float

    @classmethod
    def of(cls, maps: Iterable[Tensor]) -> Scale:
        """One for all of ``maps``, of which there may be none."""
        values = np.concatenate([np.zeros(1), *(one.float().numpy().ravel() for one in maps)])
        highest = float(values.max())
        return cls(float(np.percentile(values, 99)) or highest or 1.0, highest)


def token_name(text: str) -> str:
    """What a token is called: its text without spaces around it, escaped where it cannot be printed."""
    bare = text.strip()
    return bare if bare and bare.isprintable() else ascii(text)


def seen_part(picture: Image.Image, image_processor: Any) -> Image.Image:
    """What of ``picture`` the patches cover, in its own proportions: processors may pad it to a square or crop it."""
    if getattr(image_processor, "do_pad", None) and type(image_processor).__name__.startswith("Llava"):
        mean = tuple(int(255 * channel) for channel in image_processor.image_mean)
        picture = ImageOps.pad(picture, (max(picture.size),) * 2, color=mean)
    if not getattr(image_processor, "do_center_crop", False):
        return picture
    resized, crop = dict(image_processor.size), dict(image_processor.crop_size)
    shortest = resized.get("shortest_edge")
    box = []
    for side, name in zip(picture.size, ("width", "height"), strict=True):
        scale = shortest / min(picture.size) if shortest else resized[name] / side
        kept = crop[name] / scale
        box.append(((side - kept) / 2, (side + kept) / 2))
    (left, right), (top, bottom) = box
    return picture.crop((round(left), round(top), round(right), round(bottom)))


def pale(picture: Image.Image) -> Image.Image:
    """``picture`` in light grey, so that every colour is the map's."""
    return picture.convert("L").point(lambda grey: 190 + round(0.25 * grey))


def heat_over(picture: Image.Image, values: Tensor, end: float) -> Image.Image:
    """``picture`` under the map ``values`` (rows, columns), smoothly enlarged; ``end`` and more get the darkest colour.

    The picture is pale; the higher a value, the more its colour covers it, and zero leaves it as it is.
    """
    grid = Image.fromarray(values.float().numpy() / max(end, 1e-12))
    heat = np.asarray(grid.resize(picture.size, Image.Resampling.BILINEAR)).clip(0, 1)
    colour = 255 * matplotlib.colormaps[COLOURS](heat)[..., :3]
    cover = 0.85 * np.sqrt(heat)[..., None]
    blended = (1 - cover) * np.asarray(pale(picture))[..., None] + cover * colour
    return Image.fromarray(blended.round().astype(np.uint8))


def shared_scale(maps: AttentionMaps, rows: Sequence[Row]) -> Scale:
    """Of the probabilities on patches of all images at all layers in ``rows``."""
    return Scale.of(
        row.on_patches(layer, image) for row in rows for layer in maps.layers for image in range(len(layer.images))
    )


def attention_figure(
    maps: AttentionMaps,
    rows: Sequence[Row],
    pictures: Sequence[Image.Image],
    *,
    title: str = "",
    per_panel: bool = False,
    scale: Scale | None = None,
) -> Image.Image:
    """Panels of ``rows`` by layers, for several images side by side.

    Args:
        maps: of the text.
        rows: which tokens.
        pictures: what the patches cover of each image (`seen_part`), in the order of the maps.
        title: above the panels.
        per_panel: give each panel a scale of its own. It shows where each looks, but hides how much; by default one
            scale is shared by all panels and drawn beside them.
        scale: the shared one, for a figure that is part of a larger one.
    """
    shared = shared_scale(maps, rows) if scale is None else scale
    small = [fitted(picture, PANEL) for picture in pictures]
    columns = [(image, layer) for image in range(len(pictures)) for layer in maps.layers]
    step = PANEL + GAP
    canvas = Image.new("RGB", (len(columns) * step - GAP, len(rows) * step - GAP), "white")
    for down, row in enumerate(rows):
        for across, (image, layer) in enumerate(columns):
            values = row.on_patches(layer, image)
            panel = heat_over(small[image], values, (Scale.of([values]) if per_panel else shared).end)
            corner = across * step + (PANEL - panel.width) // 2, down * step + (PANEL - panel.height) // 2
            canvas.paste(panel, corner)
    names = [_column_name(layer, image, len(pictures)) for image, layer in columns]
    return _framed(canvas, names, [row.label for row in rows], title, None if per_panel else shared)


def fitted(picture: Image.Image, longer: int) -> Image.Image:
    """``picture`` with a longer side of so many pixels; a smaller one shows its pixels as squares."""
    scale = longer / max(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    return picture.resize((width, height), Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)


def _column_name(layer: LayerMaps, image: int, images: int) -> str:
    lines = [f"layer {layer.layer}"]
    if layer.blocks:
        lines.append(f"block{'s' * (len(layer.blocks) > 1)} {', '.join(map(str, layer.blocks))}")
    if images > 1:
        lines.insert(0, f"image {image + 1}")
    return "\n".join(lines)


def _framed(
    canvas: Image.Image, columns: Sequence[str], rows: Sequence[str], title: str, scale: Scale | None
) -> Image.Image:
    """The panels with names of columns and rows, and the scale where there is one for all."""
    right, top, bottom = RIGHT if scale is not None else 10, 90 if title else 60, 10
    width, height = canvas.width + LEFT + right, canvas.height + top + bottom
    figure = blank_figure(width, height)
    axes = figure.add_axes((LEFT / width, bottom / height, canvas.width / width, canvas.height / height))
    axes.set(xlim=(-0.5, canvas.width - 0.5), ylim=(canvas.height - 0.5, -0.5), facecolor="none")
    figure.figimage(np.asarray(canvas), LEFT, bottom)  # axes would move it by parts of a pixel
    middles = [number * (PANEL + GAP) + PANEL / 2 for number in range(max(len(columns), len(rows)))]
    axes.set_xticks(middles[: len(columns)], columns, fontsize=10)
    axes.set_yticks(middles[: len(rows)], rows, fontsize=11, parse_math=False)
    axes.tick_params(length=0, top=True, bottom=False, labeltop=True, labelbottom=False)
    axes.spines[:].set_visible(False)
    if title:
        figure.text(0.5, 1 - 22 / height, title, ha="center", va="center", fontsize=12, parse_math=False, wrap=True)
    if scale is not None:
        long = min(canvas.height, 2 * PANEL)
        place = (LEFT + canvas.width + 14, bottom + canvas.height - long, 14, long)
        add_colour_bar(figure, place, scale, "probability of a patch")
    return rendered(figure)


def add_colour_bar(figure: Figure, place: tuple[float, float, float, float], scale: Scale, label: str) -> None:
    """Draw the scale, and say where it ends; ``place`` is left, bottom, width and height in pixels."""
    width, height = figure.get_size_inches() * DPI
    left, bottom, across, up = place
    axes = figure.add_axes((left / width, bottom / height, across / width, up / height))
    cut = scale.highest > scale.end
    bar = figure.colorbar(
        ScalarMappable(Normalize(0, scale.end), COLOURS), cax=axes, extend="max" if cut else "neither"
    )
    bar.set_label(f"{label},\nto the 99th percentile\n(highest: {scale.highest:.2g})" if cut else label, fontsize=8)
    bar.ax.tick_params(labelsize=8)


def blank_figure(width: int, height: int) -> Figure:
    """A figure of so many pixels; matplotlib before 3.11 cuts off what 2.3 inches of 100 pixels lack of 230."""
    across, up = (math.nextafter(side / DPI, math.inf) for side in (width, height))
    return Figure(figsize=(across, up), dpi=DPI)


def rendered(figure: Figure) -> Image.Image:
    """The figure as a picture, pixel by pixel."""
    drawn = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # tokens may be of any script: a box stands for them
        figure.savefig(drawn, format="png")
    return Image.open(drawn).convert("RGB")


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write it as PNG."""
    png = io.BytesIO()
    picture.save(png, "PNG", optimize=True)
    write_whole(path, png.getvalue())
