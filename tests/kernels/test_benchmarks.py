"""The benchmark: its peers compute the same, a wrong one is never timed, and the whole suite runs without a GPU."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "kernels"))

from benchmarks import measuring, peers, records, render, suite, tuning  # noqa: E402
from benchmarks.case import Arguments, Case  # noqa: E402
from benchmarks.checking import Check  # noqa: E402
from benchmarks.joining import Gather, first_queries, pieces  # noqa: E402
from benchmarks.shapes import SHAPES, tiny  # noqa: E402
from benchmarks.timing import clock  # noqa: E402

from hive_ds.kernels import AttentionLayout, tiles  # noqa: E402

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def batched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here our own call is the batched one: other tests hold the interpreted kernel, which is slow and has no bf16."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_peer_agrees_with_the_reference(shape: str, dtype: torch.dtype) -> None:
    case = Case(tiny(SHAPES[shape]), CPU, dtype)
    check = Check(case)
    for peer in peers.PEERS.values():
        check.assert_agrees(peer(case))


def visible_pairs(layout: AttentionLayout) -> int:
    """(query, key) pairs of a layout without decoding, counted from `first_queries`: a second way to `Shape.pairs`."""
    position = torch.arange(layout.max_text)
    seen = first_queries(layout)[:, None, :] <= position[:, None]
    return int((seen & (position < torch.tensor(layout.text_lengths)[:, None])[:, :, None]).sum())


@pytest.mark.parametrize("name", [name for name, shape in SHAPES.items() if not shape.decode])
def test_pairs_are_counted_right(name: str) -> None:
    for shape in (SHAPES[name], tiny(SHAPES[name])):
        assert shape.pairs == visible_pairs(shape.layout("cpu"))


def test_floors_are_those_of_the_counted_work() -> None:
    # Shape a by hand: q and out 64*64*18*64, keys and values 2*(64*64 + 64*576)*6*64 elements of 2 bytes; lse and the
    # halves of two rotation tables in fp32.
    q, keys, lse, tables = 9_437_184, 62_914_560, 294_912, 10_485_760
    forward, backward = (SHAPES["a"].work(direction, torch.bfloat16) for direction in ("forward", "backward"))
    assert forward.bytes == 2 * q + keys + lse + tables
    assert backward.bytes == 4 * q + 2 * keys + lse + tables
    # Shape c is bound by its products: 4 * H * K of them for each of 8 * (2048 * 2049 / 2 + 2048 * 1024) pairs.
    forward, backward = (SHAPES["c"].work(direction, torch.bfloat16) for direction in ("forward", "backward"))
    assert forward.flops == 4 * 32 * 128 * 8 * (2048 * 2049 // 2 + 2048 * 1024)
    rates = {"bytes_per_second": 4.3e12, "flops_per_second": 790e12}
    floors = render.floors({"ceilings": rates, "shapes": {"c": {"work": {"backward": asdict(backward)}}}})
    assert floors["c", "backward"] * 1e6 == pytest.approx(1740, abs=1)


def test_keys_of_a_piece_stand_in_media_order() -> None:
    layout = AttentionLayout.build([4, 2], [[2, 1], [1]], [[1, 3], [2]])
    text, image = 0, 6
    found = [(piece.first, piece.last, piece.key_rows) for piece in pieces(layout)]
    first_image, second_image = [image, image + 1], [image + 2]
    assert found == [
        (0, 1, [text]),
        (1, 3, [text, *first_image, text + 1, text + 2]),
        (3, 4, [text, *first_image, text + 1, text + 2, *second_image, text + 3]),
        (0, 2, [4, 5]),
    ]


def test_gather_has_the_gradient_of_indexing() -> None:
    case = Case(tiny(SHAPES["a-two-images"]), CPU, torch.float64)
    tables = peers.VarlenFlash(case).plan.gather
    assert tables is not None
    x = torch.randn(case.layout.num_text + case.layout.num_image, 2, 3, dtype=torch.float64, requires_grad=True)
    gathered = Gather.apply(x, *tables)
    cotangent = torch.randn_like(gathered)
    (found,) = torch.autograd.grad(gathered, x, cotangent)
    (expected,) = torch.autograd.grad(x[tables[0]], x, cotangent)
    torch.testing.assert_close(found, expected)


class Wrong(peers.VarlenFlash):
    """Off by half a percent in one head."""

    def __call__(self, a: Arguments) -> Tensor:
        out = super().__call__(a)
        return torch.cat([out[:, :1] * 1.005, out[:, 1:]], dim=1)


@pytest.mark.parametrize("red", ["varlen", "hive"])
def test_a_red_peer_is_not_timed(red: str, monkeypatch: pytest.MonkeyPatch) -> None:
    few = {name: peers.PEERS[name] for name in ("hive", "sdpa", "varlen")} | {red: Wrong}
    monkeypatch.setattr(measuring, "PEERS", few)
    measurement = measuring.Measurement(tiny(SHAPES["a"]), CPU, torch.float32)
    rows = [measurement.row(name, "forward") for name in few]
    record = {"rows": rows, "shapes": {"a": measurement.summary()}, "date": "2000-01-01T00:00:00", "tiny": True}
    record |= {"device": {"name": "cpu"}, "torch": "", "triton": "", "commit": "", "dirty": False}
    record["ceilings"] = {"bytes_per_second": 1e9, "flops_per_second": 1e9}
    red_row = rows[list(few).index(red)]
    assert red_row["check"].startswith("AssertionError: ")
    assert "seconds" not in red_row
    assert render.table(record).count("check failed") == 1
    # Without a right time of ours there is no ratio to it.
    ratios = {row["peer"]: render.ratio(record, row) for row in rows}
    assert {name for name, ratio in ratios.items() if ratio is None} == ({"varlen"} if red == "varlen" else set(few))


def test_a_step_that_hangs_or_fails_is_red(tmp_path: Path) -> None:
    hangs = suite.Step("hangs", [sys.executable, "-c", "import time; time.sleep(60)"], 1)
    fails = suite.Step("fails", [sys.executable, "-c", "raise SystemExit(3)"], 30)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as nohup does
    try:
        suite.run([hangs, fails], dict(os.environ), tmp_path)
    finally:
        signal.signal(signal.SIGINT, before)
    assert hangs.seconds < suite.GRACE, "it hears the interrupt"
    assert (hangs.verdict, fails.verdict, fails.detail) == ("timed out", "failed", "exit status 3")


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_stage_keeps_its_rows(how: signal.Signals, tmp_path: Path) -> None:
    """Ctrl-C, and a time limit, whose SIGTERM comes twice: what was started ends, and what it wrote stays."""
    code = """if True:
        import sys
        from benchmarks import suite
        wait = "import sys, time; open(sys.argv[1], 'w').write('{\\"rows\\": [7]}'); print('on', flush=True);"
        wait += "time.sleep(60)"
        suite.training = lambda part, out: [suite.Step("it", [sys.executable, "-c", wait, str(out)], 50)]
        sys.argv = ["suite", "stage3"]
        sys.exit(suite.main())
    """
    environment = {**os.environ, "OUT": str(tmp_path), "PYTHONPATH": str(ROOT / "kernels")}
    command = [sys.executable, "-c", code]
    hear = suite._hear_interrupts
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, preexec_fn=hear) as process:
        assert process.stdout is not None
        assert "on\n" in iter(process.stdout.readline, "")
        for _ in range(1 if how == signal.SIGINT else 2):
            process.send_signal(how)
        said = process.stdout.read()  # ends when nobody holds the pipe any more
    assert process.returncode == 1
    assert "it: interrupted" in said
    (path,) = tmp_path.iterdir()
    assert json.loads(path.read_text())["rows"] == [7]


@pytest.mark.parametrize(("rows", "verdict"), [([{"seconds": 0.1}, {"check": "red"}], "passed"), ([{}], "failed")])
def test_a_stage_that_times_nothing_is_red(
    rows: list[dict[str, float]], verdict: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where compiling took all of the time."""
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    (tmp_path / "step.json").write_text(json.dumps({"rows": rows, "skipped": []}))
    step = suite.Step("training step", [], 1, verdict="passed")
    suite.write_training("stage3", step, tmp_path / "step.json", "make")
    assert step.verdict == verdict
    (path,) = (tmp_path / "out").iterdir()
    assert json.loads(path.read_text())["rows"] == rows


def test_a_second_run_keeps_the_first_ones_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of other shapes, or another STEP."""
    monkeypatch.setenv("OUT", str(tmp_path))
    record = records.describe("stage3") | {"date": "2000-01-02T03:04:05", "device": {"name": "A B"}, "commit": "c" * 40}
    written = [records.write(record | {"rows": [number]}) for number in range(3)]
    assert [path.name for path in written] == [
        f"2000-01-02-a-b-cccccccccc-stage3{end}.json" for end in ("", "-2", "-3")
    ]
    assert [json.loads(path.read_text())["rows"] for path in written] == [[0], [1], [2]]


def test_a_peer_that_fails_without_a_word_hides_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "PEERS", {name: peers.PEERS[name] for name in ("hive", "reference")})
    monkeypatch.setattr(
        measuring, "clock", lambda peer, _: Refuses() if peer.name == "hive" else clock(peer, "forward")
    )
    measurement = measuring.Measurement(tiny(SHAPES["a"]), CPU, torch.float32)
    assert measurement.row("hive", "forward")["note"] == "NotImplementedError: "
    assert measurement.row("reference", "forward")["seconds"] > 0


class Refuses:
    """No clock: as operators that there are not for a device."""

    def __iter__(self) -> None:
        raise NotImplementedError


def test_large_checks_fit_a_gpu_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("xdist", reason="needs pytest-xdist: run `make venv`")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    steps = {step.name: step.command for step in suite.checks(Path("xml"))}
    assert steps["gpu tests"][-2:] == ["-n", "12"]
    assert steps["agreement"][-2:] == ["-n", "3"]


def test_steps_import_this_clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is installed, and where nothing is; and wheels that a folder of PYTHONPATH holds, from any folder."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    (wheels / "carried.py").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"wheels{os.pathsep}kernels")
    environment = suite.child_environment(suite.importable(tmp_path), "checks")
    modules = ("hive_ds.kernels", "benchmarks", "carried")
    code = f"import {', '.join(modules)}; print({', '.join(f'{name}.__file__' for name in modules)})"
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd="/", capture_output=True, text=True)
    expected = [
        tmp_path / "hive_ds/kernels/__init__.py",
        ROOT / "kernels/benchmarks/__init__.py",
        wheels / "carried.py",
    ]
    assert done.stdout.split() == [str(path) for path in expected], done.stderr


@pytest.mark.parametrize("part", ["checks", "bench"])
def test_the_suite_runs_without_a_gpu(part: str, tmp_path: Path) -> None:
    """The very commands of a machine with a GPU, on tiny shapes and under Triton's interpreter."""
    pytest.importorskip("pytest_benchmark", reason="needs pytest-benchmark: run `make venv`")
    environment = {**os.environ, "OUT": str(tmp_path), "SHAPES": "a-decode", "CUDA_VISIBLE_DEVICES": ""}
    command = [
        "make",
        "-s",
        "-C",
        str(ROOT),
        "gpu-suite",
        f"PART={part}",
        f"SUITE_PYTHON={sys.executable}",
        "SECONDS=499",
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("*-cpu-*.json")
    record = json.loads(path.read_text())
    assert record["tiny"]
    assert record["interpreted"] or part == "checks"
    assert record["command"] == f"make gpu-suite PART={part} SHAPES=a-decode SECONDS=499"
    assert f"result file: {path}" in done.stdout
    if part == "checks":
        assert str(ROOT) not in path.read_text()
        assert sys.executable not in path.read_text()
        verdicts = {step["name"]: step["verdict"] for step in record["steps"]}
        assert verdicts.pop("memcheck") == verdicts.pop("racecheck") == "not run"
        assert set(verdicts.values()) == {"passed"}
        return
    assert {row["peer"] for row in record["rows"] if "seconds" in row} == set(peers.PEERS)
    assert render.table(record) in done.stdout
    render.picture(record, tmp_path / "roofline.png")
    assert (tmp_path / "roofline.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("content", [None, "text", "[]", '{"kind": "checks"}'])
def test_what_is_no_result_is_named(
    content: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "result.json"
    if content is not None:
        path.write_text(content)
    monkeypatch.setattr(sys, "argv", ["render", str(path)])
    with pytest.raises(SystemExit) as ended:
        render.main()
    assert ended.value.code == 2
    assert f"{path} is no result file of PART=bench: " in capsys.readouterr().err


@pytest.mark.skipif(not tiles.INTERPRETED, reason="needs the Triton interpreter: TRITON_INTERPRET=1")
def test_tuning_tells_rounding_from_another_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another tile passes; what computes something else does not. Candidates are of kernels that there are."""
    table = tiles.TABLE["sm_90"]
    for (kind, head_dim), candidates in tuning.CANDIDATES.items():
        served = [load for load in tuning.LOADS.values() if load.head_dim == head_dim and tuning.serves(kind, load)]
        assert served, kind
        assert table[kind][head_dim] not in [tiles.Tile(*each) for each in candidates], kind
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(tuning, "PATCHES", 20)
    cpu = torch.device("cpu")
    inputs = tuning.inputs_of(tuning.Load([20, 9], heads=3, groups=1), cpu)
    base = tuning.computed(inputs)
    for kind, tile in (("keys", (16, 32, 1, 1)), ("forward short", tuning.NEVER), ("backward short", tuning.NEVER)):
        with tuning.instead(kind, 64, tiles.Tile(*tile), cpu):
            assert tuning.worst_difference(tuning.computed(inputs), base) < 1e-2
    with pytest.raises(ValueError, match=r"differs by 0\.5 of the largest number"):
        tuning.worst_difference(base, base | {"out": base["out"] * 2})
