"""Pages and histograms of folders of shards show what the samples are and what training sees of them."""

from __future__ import annotations

import base64
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
from hive_ds.data.inspection.histogram import Histogram
from hive_ds.data.inspection.show import readable, write_page
from hive_ds.data.inspection.stats import image_size
from hive_ds.data.inspection.text import TextSettings
from hive_ds.data.mds.reading import ShardFolder
from hive_ds.data.schema import Sample, Turn, caption_sample
from hive_ds.data.text import encode_sample, prepare_tokenizer
from hive_ds.errors import HiveError
from hive_ds.plots import LEFT

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
    refused = 0
    for sample, chips in zip(samples, reader.articles, strict=True):
        if template == "chat" and len(sample.turns) == 1:
            assert chips == []  # starts with an answer, which the template refuses
            refused += 1
            continue
        whole = encode_sample(sample, loaded, template=template, image_position="first", max_length=1 << 30)
        tokens = [chip for chip in chips if "image" not in chip[0]]
        carry = sum(label != IGNORE_INDEX for label in whole.labels[:limit])
        cut = f", {len(whole.labels) - limit} cut away" if len(whole.labels) > limit else ""
        assert f">{min(limit, len(whole.labels))} tokens, {carry} carry loss{cut}<" in page
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
    assert page.count("training cannot use it: ") == refused == (0 if template == "plain" else 2)
    assert "<b>&" not in page
    assert not re.search(r"https?://|<script|@import|url\(", page)


def test_pictures_and_what_else_a_sample_holds(tmp_path: Path) -> None:
    """Pictures up to 128 pixels a side are stored as they are; metadata of half a surrogate pair is shown as JSON."""
    small, large, meta = png(0, (128, 20)), png(1, (1280, 128)), {"from": "<b>", "cut": "\ud83d"}
    turns = (Turn("user", "<image><image>?"), Turn("assistant", "a"))
    write_samples(tmp_path / "data", [Sample("two", turns, (small, large), meta)])
    write_page(tmp_path / "data", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    sharp, smooth = re.findall(r"<figure.*?</figure>", page)
    assert f">image 1: 128 x 20, {len(small) / 1e3:.1f} kB<" in sharp
    assert f">image 2: 1280 x 128, {len(large) / 1e3:.1f} kB<" in smooth
    assert (sharp.count('class="small"'), smooth.count('class="small"')) == (1, 0)
    shown = [Image.open(io.BytesIO(base64.b64decode(re.search(r"base64,([^\"]+)", one)[1]))) for one in (sharp, smooth)]
    assert [(image.format, image.size) for image in shown] == [("PNG", (128, 20)), ("JPEG", (640, 64))]
    assert np.array_equal(np.asarray(shown[0]), np.asarray(decode_image(small)))
    assert "{&quot;from&quot;: &quot;&lt;b&gt;&quot;, &quot;cut&quot;: &quot;\\ud83d&quot;}" in page


def test_a_sample_that_cannot_be_read_says_why_and_the_others_are_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_samples(tmp_path / "data", make_samples(3))
    get = ShardFolder.get

    def damaged(folder: ShardFolder, index: int) -> Sample:
        if index == 1:
            raise HiveError("sample number 1 in shard <x>: cannot be read")
        return get(folder, index)

    monkeypatch.setattr(ShardFolder, "get", damaged)
    assert write_page(tmp_path / "data", tmp_path / "page.html") == [0, 1, 2]
    page = (tmp_path / "page.html").read_text()
    assert '<h2>number 1</h2><p class="bad">sample number 1 in shard &lt;x&gt;: cannot be read</p>' in page
    assert page.count("<article>") == 3


@pytest.mark.parametrize("beyond", [0, 1])
def test_a_picture_behind_the_cut_is_cut_away(beyond: int, tokenizer: str, tmp_path: Path) -> None:
    """Its tokens come after the mark: where the cut is, none are left."""
    turns = (Turn("user", "one"), Turn("assistant", "red"), Turn("user", "<image>two"), Turn("assistant", "red"))
    sample = Sample("late", turns, (png(0),))
    loaded = prepare_tokenizer(make_tokenizer("llama3"))
    whole = encode_sample(sample, loaded, template="chat", image_position="first", max_length=1 << 30)
    write_samples(tmp_path / "data", [sample])
    limit = whole.image_offsets[0] + beyond
    write_page(
        tmp_path / "data",
        tmp_path / "page.html",
        settings=TextSettings(tokenizer, template="chat", max_length=limit),
    )
    reader = Chips()
    reader.feed((tmp_path / "page.html").read_text())
    assert [kind for kind, _ in reader.articles[0] if "image" in kind] == ["chip image" if beyond else "chip image cut"]


@pytest.mark.parametrize(
    ("values", "bars", "first", "last", "whole"),
    [
        (np.arange(24), [1] * 24, 0, 24, True),
        (np.array([5, 5, 7]), [2, 0, 1], 5, 8, True),
        (np.array([0.5] * 3), [3], 0.5, 0.5, False),
        (np.array([1.0] * 999 + [25.0]), [999, *[0] * 22, 1], 1, 25, False),  # all but a share below `TAIL` are equal
        (np.arange(25), [2, *[1] * 10, 0, *[1] * 11, 2], 0.12, 23.88, False),
    ],
)
def test_bars_of_a_histogram(values: np.ndarray, bars: list[int], first: float, last: float, whole: bool) -> None:
    found = Histogram.of("values", values)
    assert (found.counts, found.whole) == (bars, whole)
    assert [found.edges[0], found.edges[-1]] == pytest.approx([first, last])
    (place, label), *_ = re.findall(r'<text x="([\d.]+)" y="[\d.]+" text-anchor="middle">([^<]+)<', found.as_html())
    assert label == f"{first:.4g}"
    assert (float(place) > LEFT) == whole  # below the middle of its bar, or at its left edge
    assert len(found.edges) == len(bars) + 1


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
