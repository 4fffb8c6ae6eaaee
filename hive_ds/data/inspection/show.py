"""One HTML page of samples: pictures, text, metadata and, with a tokenizer, what training sees of them."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Sequence
from html import escape
from pathlib import Path

from PIL import Image
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from hive_ds.constants import IGNORE_INDEX, IMAGE_TOKEN
from hive_ds.data.images import decode_image
from hive_ds.data.inspection.text import TextReport, TextSettings, report_text, supervised
from hive_ds.data.mds.reading import ShardFolder, open_folder
from hive_ds.data.schema import Sample
from hive_ds.errors import HiveError
from hive_ds.files import write_whole
from hive_ds.page import document, picture

LONGEST_SIDE = 640
"""Pixels of a picture on the page; larger ones are shown smaller, which the caption's size does not say."""
SMALL = 128
"""Pixels a side up to which a picture is shown with its pixels sharp, and stored without loss."""

STYLE = """
article { border-top: 1px solid var(--rule); padding: 1rem 0; overflow-wrap: anywhere; }
article h2 { margin: 0 0 .5rem; font-size: 1.05rem; }
.pictures { display: flex; flex-wrap: wrap; gap: .8rem; margin-bottom: .6rem; }
.pictures figure { flex: 0 1 16rem; } .pictures figure img { image-rendering: auto; }
.pictures figure.small { flex-basis: 10rem; } .pictures figure.small img { image-rendering: pixelated; }
.turn { margin: .3rem 0; white-space: pre-wrap; } .turn b { color: var(--faint); font-weight: 600; }
.turn .mark, .chip.image { color: var(--two); border: 1px solid var(--two); }
.turn .mark { border-radius: 4px; padding: 0 .25rem; font-size: .85rem; }
.chips { display: flex; flex-wrap: wrap; gap: 2px; margin: .5rem 0; font: .82rem/1.5 ui-monospace, monospace; }
.chip { border: 1px solid var(--rule); border-radius: 3px; padding: 0 .2rem; white-space: pre; max-width: 100%;
  overflow: hidden; text-overflow: ellipsis; }
.chip.loss { background: color-mix(in srgb, var(--good) 22%, var(--paper)); border-color: var(--good); }
.chip.cut { text-decoration: line-through; opacity: .6; } .chip.image { font-weight: 600; }
"""

VISIBLE = str.maketrans({" ": "·", "\n": "⏎", "\t": "⇥", "\r": "␍"})
SPACE_MARKS = ("Ġ", "▁")
"""What byte-level and Unigram tokenizers write for a space; decoding one token alone may lose it."""


def choose(number: int, among: int, seed: int) -> list[int]:
    """``number`` of ``among`` sample numbers in rising order, drawn by ``seed``; all where there are no more."""
    return sorted(random.Random(seed).sample(range(among), min(number, among)))


def write_page(
    folder: str | Path, out: Path, *, number: int = 24, seed: int = 0, settings: TextSettings | None = None
) -> list[int]:
    """Write the page of ``number`` samples of a local folder of shards; returns which they are.

    Samples and images that cannot be read are shown as such. HiveError where the folder holds none.
    """
    if number < 1:
        raise HiveError(f"num is {number}, expected at least 1")
    shards = open_folder(folder)
    if not len(shards):
        raise HiveError(f"data folder {folder}: holds no samples")
    tokenizer = settings.load() if settings else None
    chosen = choose(number, len(shards), seed)
    sections = [
        f"<h1>{escape(str(folder))}</h1>",
        f"<p>{len(chosen)} of {len(shards)} samples, drawn by seed {seed}.</p>",
    ]
    if settings:
        sections.append(_legend(settings))
    for index in tqdm(chosen, desc="show", unit="sample", disable=None):
        sections.append(_article(shards, index, tokenizer, settings))
    write_whole(out, document(f"Samples of {folder}", sections, STYLE))
    return chosen


def _legend(settings: TextSettings) -> str:
    chips = [
        '<span class="chip loss">carries loss</span>',
        '<span class="chip">does not</span>',
        '<span class="chip image">image 1</span>',
        '<span class="chip cut">cut away</span>',
    ]
    said = "An image is seen by the tokens after its mark."
    return f'<p class="faint">Tokens of {escape(str(settings))}. {said}</p><p class="chips">{"".join(chips)}</p>'


def _article(
    shards: ShardFolder, index: int, tokenizer: PreTrainedTokenizerBase | None, settings: TextSettings | None
) -> str:
    shard = escape(shards.shard_of(index).name)
    try:
        sample = shards.get(index)
    except HiveError as error:
        return f'<article><h2>number {index}</h2><p class="bad">{escape(str(error))}</p></article>'
    parts = [f'<h2>{escape(sample.id)} <span class="faint">number {index}, {shard}</span></h2>']
    if sample.images:
        pictures = "".join(_picture(place, image) for place, image in enumerate(sample.images, 1))
        parts.append(f'<div class="pictures">{pictures}</div>')
    parts += [_turn(turn.role, turn.content) for turn in sample.turns]
    if sample.meta:
        told = json.dumps(sample.meta, ensure_ascii=False).encode(errors="backslashreplace").decode()  # half surrogates
        parts.append(f'<p class="faint">{escape(told)}</p>')
    if tokenizer and settings:
        parts.append(_tokens(sample, tokenizer, settings))
    return f"<article>{''.join(parts)}</article>"


def _picture(place: int, data: bytes) -> str:
    try:
        image = decode_image(data)
    except HiveError as error:
        return f'<figure><p class="bad">image {place}: {escape(str(error))}</p></figure>'
    caption = f"image {place}: {image.width} x {image.height}, {len(data) / 1e3:.1f} kB"
    small = max(image.size) <= SMALL
    image.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "PNG" if small else "JPEG", quality=85)
    shown = picture(file.getvalue(), "png" if small else "jpeg", f"image {place}")
    mark = ' class="small"' if small else ""
    return f'<figure{mark}>{shown}<figcaption class="faint">{caption}</figcaption></figure>'


def _turn(role: str, content: str) -> str:
    marked = f'<span class="mark">{escape(IMAGE_TOKEN)}</span>'.join(map(escape, content.split(IMAGE_TOKEN)))
    return f'<p class="turn"><b>{role}</b> {marked}</p>'


def _tokens(sample: Sample, tokenizer: PreTrainedTokenizerBase, settings: TextSettings) -> str:
    report = report_text(sample, tokenizer, settings)
    refused = f'<p class="bad">training cannot use it: {escape(report.reason)}</p>' if report.reason else ""
    if report.whole is None:
        return refused
    length = len(report.whole.input_ids)
    carry = supervised(report.whole.labels[: settings.max_length])
    counts = f"{min(length, settings.max_length)} tokens, {carry} carry loss"
    cut = f", {length - settings.max_length} cut away" if length > settings.max_length else ""
    chips = "".join(_chips(report, tokenizer, settings.max_length))
    return f'{refused}<p class="faint">{counts}{cut}</p><div class="chips">{chips}</div>'


def _chips(report: TextReport, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Sequence[str]:
    if report.whole is None:
        return []
    chips, offsets = [], report.whole.image_offsets
    for place, (token, label) in enumerate(zip(report.whole.input_ids, report.whole.labels, strict=True)):
        chips += _image_chips(offsets, place, max_length)
        kind = "cut" if place >= max_length else "loss" if label != IGNORE_INDEX else ""
        chips.append(
            f'<span class="chip {kind}" title="{place}: id {token}">{escape(readable(token, tokenizer))}</span>'
        )
    return chips + _image_chips(offsets, len(report.whole.input_ids), max_length)


def _image_chips(offsets: Sequence[int], place: int, max_length: int) -> list[str]:
    kind = "chip image cut" if place >= max_length else "chip image"
    return [
        f'<span class="{kind}" title="media offset {offset}">image {number}</span>'
        for number, offset in enumerate(offsets, 1)
        if offset == place
    ]


def readable(token: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of one token, its spaces and line ends made visible; part of a character as the tokenizer writes it."""
    written = str(tokenizer.convert_ids_to_tokens(token))
    text = str(tokenizer.decode([token], clean_up_tokenization_spaces=False))
    if not text or "\ufffd" in text:
        return "·" if written in SPACE_MARKS else written
    if written.startswith(SPACE_MARKS) and not text.startswith(" "):
        text = f" {text}"
    return text.translate(VISIBLE)
