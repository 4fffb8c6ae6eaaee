"""Draw a scene: shapes with smooth edges, a word in a pixel font of our own, clutter behind them."""

from __future__ import annotations

import io
import math
import random

from PIL import Image, ImageDraw

from hive_ds.data.scenes import COLOURS, GRID, SIZES, Item, Scene

SUPERSAMPLING = 4

# 5 x 7 glyphs, one hexadecimal number of 5 bits a row. A font of our own draws the same everywhere.
GLYPHS = {
    "b": "1e 11 11 1e 11 11 1e",
    "d": "1e 11 11 11 11 11 1e",
    "e": "1f 10 10 1e 10 10 1f",
    "g": "0e 11 10 17 11 11 0f",
    "h": "11 11 11 1f 11 11 11",
    "i": "0e 04 04 04 04 04 0e",
    "n": "11 19 15 13 11 11 11",
    "o": "0e 11 11 11 11 11 0e",
    "p": "1e 11 11 1e 10 10 10",
    "t": "1f 04 04 04 04 04 04",
    "u": "11 11 11 11 11 11 0e",
    "x": "11 11 0a 04 0a 11 11",
}
GLYPH_WIDTH, GLYPH_HEIGHT = 5, 7
GLYPH_PIXEL = 1 / 64
"""Side of a glyph's pixel as a share of the image's side."""


def draw_scene(scene: Scene, size: int) -> Image.Image:
    """The picture of ``scene``, RGB, ``size`` x ``size`` pixels."""
    rng = random.Random(scene.clutter)
    side = size * SUPERSAMPLING
    gray = rng.randint(20, 70)
    image = Image.new("RGB", (side, side), (gray, gray, gray))
    draw = ImageDraw.Draw(image)
    _draw_clutter(draw, side, gray, rng)
    for item in scene.items:
        _draw_item(draw, item, side, (gray, gray, gray))
    if scene.word:
        _draw_word(draw, scene.word, scene.word_cell, side, rng)
    return image.reduce(SUPERSAMPLING)


def png(image: Image.Image) -> bytes:
    """The image as the bytes of a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _draw_clutter(draw: ImageDraw.ImageDraw, side: int, gray: int, rng: random.Random) -> None:
    for _ in range(rng.randint(2, 6)):
        ends = [rng.randrange(side) for _ in range(4)]
        draw.line(ends, fill=(gray + rng.randint(10, 50),) * 3, width=side // 64)
    for _ in range(rng.randint(0, 12)):
        x, y = rng.randrange(side), rng.randrange(side)
        speck = side // 64
        draw.rectangle((x, y, x + speck, y + speck), fill=tuple(rng.randint(30, 140) for _ in range(3)))


def _draw_item(draw: ImageDraw.ImageDraw, item: Item, side: int, background: tuple[int, int, int]) -> None:
    x, y, radius = item.x * side, item.y * side, SIZES[item.size] * side
    fill = COLOURS[item.colour]
    box = (x - radius, y - radius, x + radius, y + radius)
    if item.shape == "circle":
        draw.ellipse(box, fill=fill)
    elif item.shape == "ring":
        draw.ellipse(box, fill=fill)
        hole = radius * 0.5
        draw.ellipse((x - hole, y - hole, x + hole, y + hole), fill=background)
    elif item.shape == "square":
        draw.rectangle(tuple(value + inset for value, inset in zip(box, _insets(radius * 0.1), strict=True)), fill=fill)
    elif item.shape == "triangle":
        corners = [(x + radius * math.sin(turn), y - radius * math.cos(turn)) for turn in (0, 2.2, -2.2)]
        draw.polygon(corners, fill=fill)
    else:
        bar = radius * 0.33
        draw.rectangle((x - radius, y - bar, x + radius, y + bar), fill=fill)
        draw.rectangle((x - bar, y - radius, x + bar, y + radius), fill=fill)


def _insets(inset: float) -> tuple[float, float, float, float]:
    return inset, inset, -inset, -inset


def _draw_word(draw: ImageDraw.ImageDraw, word: str, cell: tuple[int, int], side: int, rng: random.Random) -> None:
    """Draw ``word`` into its cell, on whole glyph pixels so that its edges stay sharp."""
    pixel = GLYPH_PIXEL * side
    columns = len(word) * (GLYPH_WIDTH + 1) - 1
    left, top = (
        round((cell[axis] + 0.5) / (GRID * GLYPH_PIXEL) - length / 2) + rng.randint(-1, 1)
        for axis, length in ((1, columns), (0, GLYPH_HEIGHT))
    )
    for place, letter in enumerate(word):
        for line, bits in enumerate(int(part, 16) for part in GLYPHS[letter].split()):
            for bit in range(GLYPH_WIDTH):
                if bits >> (GLYPH_WIDTH - 1 - bit) & 1:
                    x = (left + place * (GLYPH_WIDTH + 1) + bit) * pixel
                    y = (top + line) * pixel
                    draw.rectangle((x, y, x + pixel - 1, y + pixel - 1), fill=(235, 235, 235))
