"""What the commands ask of the library: every option that is given reaches what it is for."""

from __future__ import annotations

import shlex
import sys
from argparse import ArgumentTypeError
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("lmms_eval", reason="lmms-eval is not installed; make venv installs it")

from hive_ds.chat.conversation import AnswerSettings, Conversation
from hive_ds.cli import main
from hive_ds.cli_parts import port_number, split_name
from hive_ds.compare.settings import PRESETS
from hive_ds.cost.claims import with_routes
from hive_ds.data.convert_images import ImageOptions
from hive_ds.data.convert_options import ConvertOptions
from hive_ds.data.inspection.text import NO_LIMIT, TextSettings
from hive_ds.data.recaption import CaptionerSettings
from hive_ds.data.sources import Columns, SourceOptions
from hive_ds.doctor.examine import Patient
from hive_ds.evaluation.benchmarks.run import Request
from hive_ds.evaluation.probes.features import ExtractSettings
from hive_ds.evaluation.probes.settings import AttentiveSettings, KnnSettings, LinearSettings, ProbeSettings
from hive_ds.evaluation.probes.sources import DataOptions
from hive_ds.launch.hostfile import Host
from hive_ds.launch.hosts import HostFault
from hive_ds.quickstart.settings import SMOKE
from hive_ds.recipe import load_recipe

PAPER = "hive-siglip-l-mobilellm-600m"
CHAT = SimpleNamespace(template="chat")
SOURCE = "--preset cc3m --format table --images pictures --split val --id-column key --image-column picture"
STUBS = {
    "hive_ds.data.sources.open_source": lambda *given: given,
    "hive_ds.data.images.auto_image_processor": lambda name: name,
    "hive_ds.launch.hostfile.read_hostfile": lambda path: [path],
    "hive_ds.launch.hostfile.carried_variables": lambda environ: {"NAME": "value"},
    "hive_ds.ablation.plan.make_plan": lambda *given: list(given),
    "hive_ds.chat.page.require_gradio": lambda: None,
    "hive_ds.chat.loading.load_chat_model": lambda path: CHAT,
    "hive_ds.chat.conversation.read_image": lambda path: path,
    "hive_ds.evaluation.probes.sources.open_data": lambda options: options,
    "hive_ds.evaluation.probes.cache.FeatureCache": lambda folder: ("cache", folder),
    "hive_ds.evaluation.probes.encoder.load_encoder": lambda *given, **more: (*given, *more.items()),
}
"""What stands in for what reads files, and hands on what it was asked for."""
SHARDS = (Path("in"), TextSettings("words", "chat", 99))
TOKENS = "--tokenizer words --template chat"
PLAN = ["tiny", ["a=1", "b=2"], ["hive", "sa"], [4, 5], Path("out")]
ARMS = "tiny out --arms hive,sa --seeds 4,5 --set a=1 --set b=2"
DATA = DataOptions("pictures", "cifar10", "a", "b", "c", "d", 0.3)
PROBE = "probe base=tower --data pictures --preset cifar10 --train-split a --test-split b --image-column c"
PROBE += " --label-column d --test-share 0.3 --dtype bf16 --device cpu --blocks 2,5 --seeds 2"
TOWER = ("tower", "base", ("device", "cpu"), ("dtype", "bf16"))
ANSWERS = "--max-new-tokens 9 --temperature 0.5 --beams 2 --seed 3"
ASKED = Conversation(CHAT, AnswerSettings(9, 0.5, 2, 3), shown=["a.png", "b.png"])  # type: ignore[arg-type]


def probing(head: Any, **more: Any) -> tuple[str, tuple[Any, ...], dict[str, Any]]:
    settings = ProbeSettings(head, (2, 5), (0, 1))
    usual = {"extract": ExtractSettings(64, 0, "fp32"), "cache": ("cache", "runs/probe_cache")}
    return "hive_ds.evaluation.probes.sweep.probe", (TOWER, DATA, settings), usual | more


CASES: dict[str, tuple[str, tuple[Any, ...], dict[str, Any]]] = {
    "quickstart --out out --seed 3 --smoke": (
        "hive_ds.quickstart.pipeline.run_quickstart",
        (Path("out"),),
        {"seed": 3, "settings": SMOKE},
    ),
    "data scenes out --num 7 --seed 3 --size 32": (
        "hive_ds.data.scenes_samples.write_scenes",
        (Path("out"), 7, 3),
        {"size": 32},
    ),
    f"data convert in.csv out {SOURCE} --text-column alt --workers 3 --limit 50 --shuffle 4"
    " --resize 64 --image-format webp --quality 80 --compression zstd --part-size 20 --max-reject-share 0.25": (
        "hive_ds.data.convert.convert",
        (
            (SourceOptions("in.csv", "table", "pictures", "val", Columns("key", "picture", "alt")), "cc3m"),
            "out",
            ConvertOptions(3, 20, ImageOptions(64, "webp", 80), 0.25, 50, 4, "zstd"),
        ),
        {},
    ),
    "data convert in.csv out --conversations-column said": (
        "hive_ds.data.convert.convert",
        (
            (SourceOptions("in.csv", columns=Columns(conversations="said")), None),
            "out",
            ConvertOptions(images=ImageOptions(quality=90)),
        ),
        {},
    ),
    "data convert in.csv out --captions new.jsonl": (
        "hive_ds.data.convert.convert",
        (
            (SourceOptions("in.csv", columns=Columns(texts=False)), None),
            "out",
            ConvertOptions(captions=Path("new.jsonl"), images=ImageOptions(quality=90)),
        ),
        {},
    ),
    f"data verify in {TOKENS} --max-length 99 --workers 3": (
        "hive_ds.data.inspection.verify.verify",
        SHARDS,
        {"workers": 3},
    ),
    f"data stats in {TOKENS}": (
        "hive_ds.data.inspection.stats.measure_folder",
        (Path("in"), TextSettings("words", "chat", NO_LIMIT)),
        {},
    ),
    f"data show in out.html {TOKENS} --max-length 99 --num 5 --seed 3": (
        "hive_ds.data.inspection.show.write_page",
        (Path("in"), Path("out.html")),
        {"number": 5, "seed": 3, "settings": SHARDS[1]},
    ),
    f"data recaption in.csv out.jsonl {SOURCE} --captioner blip --prompt what? --max-new-tokens 5 --device cpu"
    " --dtype fp32 --batch-size 2": (
        "hive_ds.data.recaption.recaption",
        (
            (SourceOptions("in.csv", "table", "pictures", "val", Columns("key", "picture", texts=False)), "cc3m"),
            Path("out.jsonl"),
            CaptionerSettings("blip", "what?", 5, "cpu", "fp32"),
        ),
        {"batch_size": 2},
    ),
    "data speed in --image-processor siglip --seconds 0.5": (
        "hive_ds.data.speed.measure_speed",
        (Path("in"), "siglip", 0.5),
        {},
    ),
    "doctor --hostfile hosts --recipe tiny --set training.seed=7 --run run --data shards --port 5": (
        "hive_ds.doctor.examine.examine",
        (Patient([Path("hosts")], load_recipe("tiny", ["training.seed=7"]), Path("run"), "shards", 5),),
        {},
    ),
    "hosts check hosts --folder run --port 5": (
        "hive_ds.launch.hosts.check_hosts",
        ([Path("hosts")],),
        {"folder": Path("run"), "port": 5},
    ),
    "hosts env hosts --out variables": (
        "hive_ds.launch.hostfile.write_deepspeed_env",
        (Path("variables"), {"NAME": "value"}),
        {},
    ),
    "hosts run hosts --port 5 -- --recipe tiny": (
        "hive_ds.launch.hosts.run_on_hosts",
        ([Path("hosts")], ["--recipe", "tiny"]),
        {"port": 5},
    ),
    "supervise --restarts 4 --failures 2 --pause 0 --folder run/stage1 -- train me": (
        "hive_ds.launch.supervise.Supervisor",
        (["train", "me"], Path("run/stage1")),
        {"restarts": 4, "failures": 2, "pause": 0},
    ),
    "supervise -- train --run run --stage 2": (
        "hive_ds.launch.supervise.Supervisor",
        (["train", "--run", "run", "--stage", "2"], Path("run/stage2")),
        {"restarts": 100, "failures": 3, "pause": 10},
    ),
    "report a b --out both.html": ("hive_ds.report.page.write_report", ([Path("a"), Path("b")], Path("both.html")), {}),
    "export encoder run out --format timm --tail cut --scores mine.json": (
        "hive_ds.export.export_encoder",
        (Path("run"), Path("out")),
        {"format": "timm", "tail": "cut", "scores": Path("mine.json")},
    ),
    "export vlm run out --scores mine.json": (
        "hive_ds.export.export_vlm",
        (Path("run"), Path("out")),
        {"scores": Path("mine.json")},
    ),
    f"chat run --browser --host here --port 5 {ANSWERS}": (
        "hive_ds.chat.page.serve",
        (CHAT, ASKED.settings),
        {"host": "here", "port": 5},
    ),
    f"chat run --image a.png --image b.png --map map.png --map-per-panel {ANSWERS} hm?": (
        "hive_ds.chat.terminal.answer_once",
        (ASKED, "hm?", Path("map.png")),
        {"per_panel": True},
    ),
    f"chat run --image a.png --image b.png --map map.png {ANSWERS}": (
        "hive_ds.chat.terminal.talk",
        (ASKED, Path("map.png")),
        {"per_panel": False},
    ),
    f"{PROBE} --l2 0.5 --encode-batch 8 --workers 3 --store fp16": probing(
        LinearSettings(0.5), extract=ExtractSettings(8, 3, "fp16")
    ),
    f"{PROBE} --head attentive --epochs 2 --lr 0.1 --batch-size 4 --cache none": probing(
        AttentiveSettings(epochs=2, batch_size=4, lr=0.1), cache=None
    ),
    f"{PROBE} --head knn --k 3 --temperature 0.5 --cache kept": probing(KnnSettings(3, 0.5), cache=("cache", "kept")),
    "eval run --tasks mme,gqa --data bench --out out --limit 5 --batch-size 2 --device cpu --dtype bfloat16"
    " --encoder tower --no-self-test": (
        "hive_ds.evaluation.benchmarks.run.evaluate",
        (
            Request(
                *(["mme", "gqa"], Path("bench"), Path("run"), Path("out"), 5, 2, "cpu", "bfloat16"),
                encoder=Path("tower"),
                self_test=False,
            ),
        ),
        {},
    ),
    "eval run --tasks mme --data bench": (
        "hive_ds.evaluation.benchmarks.run.evaluate",
        (Request(["mme"], Path("bench"), Path("run"), self_test=True),),
        {},
    ),
    f"ablate run {ARMS} --launcher 'deepspeed --num_gpus 8' --after 'judge {{run}}' --jobs 2": (
        "hive_ds.ablation.execute.run_all",
        (PLAN, ["deepspeed", "--num_gpus", "8"]),
        {"after": "judge {run}", "jobs": 2},
    ),
    f"ablate run {ARMS}": (
        "hive_ds.ablation.execute.run_all",
        (PLAN, [sys.executable, "-m", "hive_ds.train"]),
        {"after": None, "jobs": 1},
    ),
    f"ablate submit {ARMS} --command 'pipeline.sh --nodes 4'": (
        "hive_ds.ablation.execute.submit_all",
        (PLAN, ["pipeline.sh", "--nodes", "4"]),
        {},
    ),
    "compare --out out --preset gpu --seeds 4,5": (
        "hive_ds.compare.pipeline.Comparison",
        (Path("out"), replace(PRESETS["gpu"], seeds=(4, 5))),
        {},
    ),
}


class AskedError(Exception):
    """The call that a command has come to: its arguments, and those with names."""


def ask(*given: Any, **named: Any) -> None:
    raise AskedError(given, named)


def asked(command: Sequence[str], target: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, ...]:
    """What ``command`` calls ``target`` with; it goes no further."""
    for name, stub in STUBS.items():
        monkeypatch.setattr(name, stub)
    monkeypatch.setattr(target, ask)
    with pytest.raises(AskedError) as caught:
        main(command)
    return caught.value.args


@pytest.mark.parametrize("command", CASES)
def test_every_option_reaches_the_library(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    target, given, named = CASES[command]
    assert asked(shlex.split(command), target, monkeypatch) == (given, named)


def test_routes_reach_the_recipe_that_is_costed(monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["cost", PAPER, "--routes", "6", "--stage", "2", "--text-length", "9", "--batch", "3", "--ranks", "4"]
    recipe = with_routes(load_recipe(PAPER, ["training.precision=fp32"]), 6)
    given, named = asked(
        [*command, "--set", "training.precision=fp32"], "hive_ds.cost.ledger.cost_of_stage", monkeypatch
    )
    assert (given, named) == ((recipe, 2), {"text_length": 9, "batch": 3, "ranks": 4})


@pytest.mark.parametrize(
    ("given", "name", "source"),
    [
        ("base=tower", "base", "tower"),
        ("base=runs/lr=1e-4", "base", "runs/lr=1e-4"),
        *((path, None, path) for path in ("tower", "runs/lr=1e-4", "./lr=1e-4")),
    ],
)
def test_a_path_with_an_equals_sign_is_no_name(given: str, name: str | None, source: str) -> None:
    assert split_name(given) == (name, source)


def test_ports() -> None:
    assert [port_number(text) for text in ("1", "65535")] == [1, 65535]
    for text in ("0", "65536", "-1", "1.5", "http", ""):
        with pytest.raises(ArgumentTypeError, match="is no port; expected 1 to 65535"):
            port_number(text)


def test_faults_of_hosts_are_exit_code_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    faults = [HostFault("two", "no answer", "start it")]
    monkeypatch.setattr("hive_ds.launch.hostfile.read_hostfile", lambda path: [Host("one", 2), Host("two", 3)])
    monkeypatch.setattr("hive_ds.launch.hosts.check_hosts", lambda hosts, **more: faults)
    assert main(["hosts", "check", "hosts"]) == 1
    assert capsys.readouterr().out == "two: no answer; start it\n"
    faults.clear()
    assert main(["hosts", "check", "hosts"]) == 0
    assert capsys.readouterr().out == "2 hosts, 5 slots: no fault found\n"
