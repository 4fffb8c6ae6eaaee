"""The page of runs: everything that their folders hold is on it, and nothing is fetched."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from xml.etree import ElementTree

import pytest
from page_reader import Reader
from run_folders import long_run, start, train, validation, write_results, write_stage

from hive_ds.cli import main
from hive_ds.errors import HiveError
from hive_ds.plots import Line, line_plot, thinned
from hive_ds.recipe import dump_recipe, load_recipe
from hive_ds.report.page import render_report, write_report
from hive_ds.report.run import read_runs

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
PHONE = 390
"""Pixels: the width of a common phone."""
FRAME = """<iframe style="width:%dpx;height:844px;border:0"></iframe><script>
const frame = document.querySelector("iframe");
frame.onload = () => {
  const page = frame.contentDocument, view = page.documentElement;
  const outside = [...page.querySelectorAll("body *")].filter(one =>
    !one.closest(".wide, pre, svg") && one.getBoundingClientRect().right > view.clientWidth + 0.5);
  document.body.dataset.measured = [view.clientWidth, view.scrollWidth, outside.length].join(" ");
};
frame.srcdoc = %s;
</script>"""
"""A page in a frame of a phone's width, for Chromium makes no window that narrow, and how wide its content is."""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = long_run(tmp_path / "long")
    write_results(folder)
    return folder


def cells(page: str) -> list[list[str]]:
    """Every table row of a page."""
    rows = re.findall(r"<tr.*?>(.*?)</tr>", page)
    return [re.findall(r"<t[hd]>(.*?)</t[hd]>", row) for row in rows]


def test_all_of_a_run_is_on_its_page(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(run)]) == 0
    file = run / "report.html"
    assert capsys.readouterr().out == f"page: {file}\n"
    rows = cells(file.read_text())
    assert ["long", "done, 1000 steps", "not done: step 40 of 100"] in rows
    assert ["long", "1 held out", "3.5000", "2.5000", "2.5000"] in rows
    assert ["long", "eval", "gqa", "accuracy", "61.5", "100", "400"] in rows
    assert ["long", "probes/food", "HIVE", "food", "linear", "11", "81.2 % ± 1.5"] in rows
    assert ["long", "colour", "100 %", "21 to 100", "0 %", "1"] in rows
    assert ["probe shape", "0.625"] in rows
    assert ["torch", "2.99.0"] in rows
    ended = [row[-1] for row in rows if row[:2] in (["long", "1"], ["long", "2"]) and len(row) == 7]
    assert ended[:2] == ["broken off; the next one went on from step 500", "done"]
    assert ended[2].startswith("no end recorded; last heard of ")
    assert ended[3] == "hung: node1; killed by signal 9: node2"
    # 500 steps on 2 ranks and 500 on 4, half a second each, at 0.4 of 1e12 FLOPs a second.
    cost = next(row for row in rows if row[:3] == ["long", "1", "1,000"])
    assert cost[4:] == ["2 x NVIDIA H200, 4 x NVIDIA H200", "0.417", "0.5", "600 T", "40.0 %", "3.25 GB"]


def test_data_of_several_folders_are_named_with_their_weights(tmp_path: Path) -> None:
    stage = write_stage(tmp_path / "run", 1, [start(0), train(1, 9)])
    recipe = load_recipe("tiny", ["data.train={data/captions: 0.75, data/web: 2}", "data.validation=data/held-out"])
    (stage / "recipe.yaml").write_text(dump_recipe(recipe))
    page = render_report(read_runs([tmp_path / "run"]))
    assert "<dt>training data</dt><dd>data/captions (0.75), data/web (2)</dd>" in page
    assert "<dt>held-out data</dt><dd>data/held-out</dd>" in page
    assert "<dt>vision blocks</dt><dd>1, 2, 3</dd>" in page


def test_attempts_that_were_asked_to_stop_say_so(tmp_path: Path) -> None:
    lines = [train(step, 9) for step in range(1, 4)]
    stop = {"event": "stop", "step": 3, "time": 1.8e9}
    # Stopped; gone on from there and killed before its next checkpoint; stopped once more.
    events = [start(0), *lines, stop, start(3), start(3), train(4, 9), {**stop, "step": 4}]
    write_stage(tmp_path / "run", 1, events, done=False)
    page = render_report(read_runs([tmp_path / "run"]))
    ended = [row[-1] for row in cells(page) if row[:2] == ["run", "1"] and len(row) == 7]
    asked, broken, last = ended
    assert asked == "stopped as asked; the next one went on from step 3"
    assert broken == "broken off; the next one went on from step 3"
    assert last == "stopped as asked at step 4"


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ({"event": "train", "step": 7}, r"stage1/metrics.jsonl: KeyError: 'seconds_per_step'; expected lines that"),
        ({"event": "start", "step": "x"}, r"stage1/metrics.jsonl: KeyError: 'ranks'; expected lines that"),
        ({"event": "bad_samples", "step": 7}, r"report of \S+/run: KeyError: 'samples'; expected folders as training"),
        ({"event": "validation", "loss": 1.0}, r"report of \S+/run: KeyError: 'step'; expected folders as training"),
    ],
)
def test_lines_that_lack_something_are_one_line(tmp_path: Path, line: dict, named: str, capsys) -> None:
    write_stage(tmp_path / "run", 1, [start(0), train(1, 9), line, train(8, 9)])
    assert main(["report", str(tmp_path / "run")]) == 2
    assert re.match(f"error: .*{named}", capsys.readouterr().err)


def test_what_went_wrong_is_said(run: Path) -> None:
    page = render_report(read_runs([run]))
    for said in (
        "stage 2: skipped step 21; samples of the last: s7, s8",
        "stage 2: unreadable samples replaced by others: 1 (0.078 %), the first of them b1: truncated &lt;file&gt;",
        "stage 2: the loss was not finite at step 21",
        "stage 2: rank 1 held the others up (compute, 1.3 times or more), 40 of 40 lines",
        "stage 2: no checkpoint could be written at step 40: no space left",
        "stage 2: a hang (hang): the others wait for rank 1 on &lt;node2&gt;",
    ):
        assert f"<li>{said}</li>" in page
    assert "stage 1:" not in page


def test_nothing_is_fetched_and_pictures_are_inside(run: Path) -> None:
    page = render_report(read_runs([run]))
    reader = Reader()
    reader.feed(page)
    assert reader.open == []
    assert reader.counts["img"] == 1  # the other one is half written
    inside = [source for source in reader.sources if source.startswith("data:image/png;base64,")]
    assert len(inside) == 1
    assert all(source.startswith("#") for source in reader.sources if source not in inside)
    assert not re.search(r"https?://|<script|@import|url\(", page)
    assert "stage1, step-000500, attention of layer 4" in page
    assert len(page) < 400_000


def test_long_curves_are_thinned_and_keep_their_spikes(run: Path) -> None:
    points = [(float(step), 77.0 if step == 701 else step % 3) for step in range(10_000)]
    kept = thinned(points)
    assert len(kept) <= 402
    assert (701.0, 77.0) in kept
    assert (kept[0], kept[-1]) == (points[0], points[-1])
    assert set(kept) <= set(points)
    assert thinned(points[:400]) == points[:400]
    page = render_report(read_runs([run]))
    drawn = [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", page)]
    lengths = [len(line.attrib["points"].split()) for svg in drawn for line in svg.iter("polyline")]
    assert max(lengths) <= 402


def test_small_plot_has_its_legend_below() -> None:
    plot = line_plot(
        [
            Line("a <name>", "red", [(1, 5.0), (2, 6.0)]),
            Line("", "blue", [(1, 5.5)]),
            Line("held out", "green", [(2, 5.8)]),
        ],
        "x",
        "y",
        small=True,
        from_zero=False,
    )
    svg, _, below = plot.partition("</svg>")
    assert below.count("<span>") == 2
    assert '<i class="line" style="background:red"></i>a &lt;name&gt;<' in below
    assert '<i class="dot" style="background:green"></i>held out<' in below
    assert "name" not in svg
    assert svg.count("<circle") == 2  # of one point no line could be seen
    assert ">0</text>" not in svg


def test_runs_side_by_side(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "elsewhere" / "long"
    events = [start(0), *(train(step, 10) for step in range(1, 11)), validation(10, 1.5)]
    for number in (4, 5):
        write_stage(other, number, events, recipe="tiny-base")
    assert main(["report", str(run), str(other), "--out", str(tmp_path / "both.html")]) == 0
    page = (tmp_path / "both.html").read_text()
    rows = cells(page)
    first = f"{tmp_path.name}/long"
    assert [first, "done, 1000 steps", "not done: step 40 of 100", "", ""] in rows
    assert ["elsewhere/long", "", "", "done, 10 steps", "done, 10 steps"] in rows
    assert ["stages.connector_pretraining", "yes", "left out"] in rows
    assert not any(row and row[0].startswith("stages.connector_pretraining.") for row in rows)
    assert "<h3>Stage 4: vlm alignment</h3>" in page
    assert "Every value of elsewhere/long" in page


def test_a_run_that_lacks_files(tmp_path: Path) -> None:
    folder = tmp_path / "bare" / "stage3"
    folder.mkdir(parents=True)
    for damaged in (b"not: [closed", b"\xff\x00"):
        (folder / "recipe.yaml").write_bytes(damaged)
        page = render_report(read_runs([tmp_path / "bare"]))
        assert "nothing logged" in page
        assert "No recipe.yaml could be read." in page
    (folder / "recipe.yaml").unlink()
    begun = {**start(0), "ranks": 1, "device": "cpu"}
    (folder / "metrics.jsonl").write_text(json.dumps(begun) + "\n")
    page = render_report(read_runs([tmp_path / "bare"]))
    assert "begun, nothing logged yet" in page
    assert "1 x cpu" in page


def test_wrong_folders_are_refused(run: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "circle").symlink_to("circle")
    for folders, message in (
        ([tmp_path / "missing"], "missing: no such folder"),
        ([tmp_path / "circle"], "circle: no such folder"),
        ([tmp_path / "empty"], "empty: holds no stage folder with metrics.jsonl or recipe.yaml"),
        ([tmp_path], f"it holds runs, name those: {run}"),
        ([run, run / ".." / "long"], "given twice"),
    ):
        with pytest.raises(HiveError, match=re.escape(message)):
            read_runs(folders)
    with pytest.raises(HiveError, match="cannot be written"):
        write_report([run], run / "stage1" / "DONE" / "report.html")
    assert main(["report", str(tmp_path / "empty")]) == 2


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium")
def test_a_phone_need_not_scroll_sideways(run: Path, tmp_path: Path) -> None:
    """In a real browser: nothing but tables and code, which scroll by themselves, is wider than the window."""
    page = render_report(read_runs([run]))
    planted = page.replace("</h1>", f"</h1><div style='width:{PHONE + 1}px'>.</div>")
    assert measured(page, tmp_path) == (PHONE, PHONE, 0)
    assert measured(planted, tmp_path) == (PHONE, PHONE + 17, 1)  # the body's margin of 16


def measured(page: str, folder: Path) -> tuple[int, ...]:
    """Width of the frame, of the page in it, and how many elements reach out of the frame."""
    (folder / "frame.html").write_text(FRAME % (PHONE, json.dumps(page).replace("</", "<\\/")))
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += [f"--user-data-dir={folder / 'profile'}", "--dump-dom", f"file://{folder / 'frame.html'}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    found = re.search(r'data-measured="(\d+) (\d+) (\d+)"', done.stdout)
    assert found, done.stderr
    return tuple(map(int, found.groups()))
