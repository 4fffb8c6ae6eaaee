"""Pages and histograms of folders of shards show what the samples are and what training sees of them."""

from __future__ import annotations

import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from shard_folders import write_samples
from tiny_data import TOKENIZERS, make_samples, make_tokenizer, png

from hive_ds.cli import main
from hive_ds.constants import IGNORE_INDEX
from hive_ds.data.images import decode_image
from hive_ds.data.inspection.show import readable, write_page
from hive_ds.data.inspection.stats import image_size
from hive_ds.data.schema import Sample, Turn, caption_sample
from hive_ds.data.text import encode_sample, prepare_tokenizer

NUMBER = 23


def test_histograms_are_those_of_the_samples(
    tokenizer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = [(8, 8)] * 3 + [(40 + 10 * index, 20) for index in range(30)]
    samples = [caption_sample(f"c{index}", png(index, size), "red" * (index + 1)) for index, size in enumerate(sizes)]
    turns = (Turn("user", "<image>?"), Turn("assistant", "a"), Turn("user", "<image>"), Turn("assistant", "b"))
    samples.append(Sample("talk", turns, (png(1, (8, 16)), turned_photo(30, 10))))
    samples.append(caption_sample("bad", b"not an image", "red"))
    write_samples(tmp_path / "data", samples)
    page = tmp_path / "pages" / "stats.html"
    assert main(["data", "stats", str(tmp_path / "data"), "--tokenizer", tokenizer, "--out", str(page)]) == 0
    numbers = json.loads(page.with_suffix(".json").read_text())
    found = numbers["histograms"]
    assert numbers["samples"] == 35
    assert found["turns a sample"]["counts"] == [34, 0, 1]
    assert found["turns a sample"]["edges"] == [2, 3, 4, 5]
    assert found["images a sample"]["counts"] == [34, 1]
    lengths = [sum(len(turn.content) for turn in sample.turns) for sample in samples]
    assert found["characters a sample"]["quantiles"]["median"] == np.median(lengths)
    assert found["characters a sample"]["mean"] == pytest.approx(np.mean(lengths))
    widths = [width for width, _ in sizes] + [8, 10]
    assert (found["image width"]["quantiles"]["max"], found["image width"]["number"]) == (max(widths), len(widths))
    assert found["image width"]["mean"] == pytest.approx(np.mean(widths))
    assert sum(found["image width"]["counts"]) == len(widths)  # those beyond the bars are counted in the outermost
    assert found["width / height"]["quantiles"]["min"] == pytest.approx(1 / 3)  # the photo, upright
    assert found["tokens a sample"]["number"] == 34  # one sample is no caption
    said = capsys.readouterr().out
    assert "1 samples or images cannot be read" in said
    assert "1 samples do not fit the template" in said
    assert "turns a sample            2 █ ▁ 4" in said
    html = page.read_text()
    assert html.count("<svg") == len(found) == 9
    assert not re.search(r"https?://|<script|@import|url\(", html)


def turned_photo(width: int, height: int) -> bytes:
    """A JPEG that its EXIF tag turns by a quarter."""
    out, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (width, height)).save(out, "JPEG", exif=exif)
    return out.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_sizes_are_those_of_the_image_upright(kind: str) -> None:
    """Which are not decoded for it."""
    for orientation in range(1, 9):
        out, exif = io.BytesIO(), Image.Exif()
        exif[0x0112] = orientation
        Image.new("RGB", (30, 10)).save(out, kind, exif=exif)
        assert image_size(out.getvalue()) == decode_image(out.getvalue()).size, orientation


class Chips(HTMLParser):
    """Collects (classes, text) of every chip below the legend, article by article, and every source."""

    def __init__(self) -> None:
        super().__init__()
        self.articles: list[list[tuple[str, str]]] = []
        self.sources: list[str] = []
        self._kind = ""

    def handle_starttag(self, tag: str, attributes: list) -> None:
        values = dict(attributes)
        self.sources += [values[name] for name in ("src", "href") if name in values]
        if tag == "article":
            self.articles.append([])
        self._kind = values.get("class") or ""

    def handle_data(self, data: str) -> None:
        if self._kind.startswith("chip") and self.articles:
            self.articles[-1].append((self._kind.strip(), data))

    def handle_endtag(self, tag: str) -> None:
        self._kind = ""


@pytest.mark.parametrize("template", ["plain", "chat"])
def test_page_shows_what_training_sees(template: str, tokenizer: str, tmp_path: Path) -> None:
    samples = make_samples(12, bad=(2,))
    samples[0] = caption_sample("<b>&", png(0), "red é\n circle " * 4)
    write_samples(tmp_path / "data", samples)
    limit = 16 if template == "plain" else 30
    options = ["--tokenizer", tokenizer, "--template", template, "--max-length", str(limit), "--num", "99"]
    assert main(["data", "show", str(tmp_path / "data"), str(tmp_path / "page.html"), *options]) == 0
    page = (tmp_path / "page.html").read_text()
    reader = Chips()
    reader.feed(page)
    loaded = prepare_tokenizer(make_tokenizer("llama3"))
    assert len(reader.articles) == 12
    for sample, chips in zip(samples, reader.articles, strict=True):
        if template == "chat" and len(sample.turns) == 1:
            assert chips == []  # starts with an answer, which the template refuses
            continue
        whole = encode_sample(sample, loaded, template=template, image_position="first", max_length=1 << 30)
        tokens = [chip for chip in chips if "image" not in chip[0]]
        expected = ["chip loss" if label != IGNORE_INDEX else "chip" for label in whole.labels]
        assert [kind for kind, _ in tokens] == expected[:limit] + ["chip cut"] * max(0, len(expected) - limit)
        before = [sum("image" not in kind for kind, _ in chips[:at]) for at, c in enumerate(chips) if "image" in c[0]]
        assert before == whole.image_offsets
    assert any("chip cut" in kind for kind, _ in reader.articles[0])
    assert [text for _, text in reader.articles[0]].count("⏎") == (
        4 if template == "plain" else 8
    )  # a chat's headers end in two
    assert all(source.startswith("data:image/") for source in reader.sources)
    assert len(reader.sources) == sum(len(sample.images) for sample in samples) - 1
    assert page.count("cannot be read") == 1
    assert "<b>&" not in page
    assert not re.search(r"https?://|<script|@import|url\(", page)


def test_choice_of_samples_follows_the_seed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_samples(tmp_path / "data", make_samples(NUMBER))
    chosen = write_page(tmp_path / "data", tmp_path / "a.html", number=5)
    assert len(set(chosen)) == 5
    assert write_page(tmp_path / "data", tmp_path / "b.html", number=5) == chosen
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()
    assert write_page(tmp_path / "data", tmp_path / "c.html", number=5, seed=1) != chosen
    assert main(["data", "show", str(tmp_path / "data"), str(tmp_path / "d.html"), "--num", "0"]) == 2
    assert "num is 0, expected at least 1" in capsys.readouterr().err


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_chips_put_together_are_the_text(kind: str) -> None:
    tokenizer = make_tokenizer(kind)
    ids = tokenizer("the word\n red square", add_special_tokens=False)["input_ids"]
    shown = "".join(readable(token, tokenizer) for token in ids)
    expected = {"wordpiece": "thewordredsquare", "llama2": "·the·word⏎·red·square"}
    assert shown == expected.get(kind, "the·word⏎·red·square")
