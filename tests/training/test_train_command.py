"""`deepspeed --module hive_ds.train`: three stages on 2 ranks, a kill in the middle, and wrong input."""

from __future__ import annotations

import json
import re
import shutil
import socket
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from forked import run_forked
from PIL import Image
from profiles import shares
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_run import BAD, INTERVAL, STEPS, TinyRun
from transformers import AutoProcessor, LlavaForConditionalGeneration

from hive_ds.constants import EXIT_STOPPED
from hive_ds.kernels import tiles
from hive_ds.model.hive import HiveForCausalLM
from hive_ds.model.identity import folder_sha256
from hive_ds.model.loading import load_any
from hive_ds.processing import HiveProcessor
from hive_ds.stages import ModuleGroup, assign_groups, cascaded_groups, hive_groups, stage_by_number
from hive_ds.train import main
from hive_ds.training.distributed import stop
from hive_ds.training.metrics import TRAIN_KEYS
from hive_ds.training.schedule import Schedule

EQUAL_ACROSS_ATTEMPTS = (
    "step",
    "loss",
    "lr",
    "grad_norm",
    "grad_norms",
    "samples",
    "cut_samples",
    "bad_samples",
    "supervised_share",
    "skipped_steps",
)


@pytest.fixture(scope="module")
def straight(tiny: TinyRun) -> str:
    """Stage 1 under ZeRO-3 on 2 ranks through the deepspeed launcher; returns what it printed."""
    done = tiny.train(1, "straight")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def pretrained(tiny: TinyRun, straight: str) -> dict[int, str]:
    """Stages 2 and 3 after `straight`; what each printed."""
    return {number: tiny.train_forked(number, "straight") for number in (2, 3)}


@pytest.fixture
def one_rank(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the test call `main` in this process, and leave nothing of a run behind that ends in an error.

    That is a process group, launcher variables, and ZeRO-3's own `linear`.
    """
    monkeypatch.setattr(torch.nn.functional, "linear", torch.nn.functional.linear)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "")  # so that it is put back afterwards
        monkeypatch.delenv(name)
    yield
    stop()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def groups_that_moved(
    before: dict[str, torch.Tensor],
    after: dict[str, torch.Tensor],
    groups: tuple[ModuleGroup, ...] = hive_groups([1, 3], 3),
) -> dict[str, set[bool]]:
    """Group -> whether its parameters differ in any byte."""
    group_of = assign_groups(sorted(before), groups)
    moved: dict[str, set[bool]] = {}
    for name, group in group_of.items():
        moved.setdefault(group, set()).add(
            not torch.equal(before[name].view(torch.uint8), after[name].view(torch.uint8))
        )
    return moved


def test_run_folder_is_complete(tiny: TinyRun, straight: str) -> None:
    folder = tiny.root / "straight" / "stage1"
    assert (folder / "DONE").exists()
    assert (folder / "latest").read_text() == f"step-{STEPS:06d}"
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-000008", "step-000012"]
    assert json.loads((folder / "ds_config.json").read_text())["train_batch_size"] == 8
    processor, model = (
        HiveProcessor.from_pretrained(folder / "model"),
        HiveForCausalLM.from_pretrained(folder / "model"),
    )
    assert model.language_model.lm_head.weight is model.language_model.model.embed_tokens.weight
    assert processor.image_position == "first"


def test_table_and_next_step_are_printed_once(straight: str) -> None:
    assert straight.count("Stage 1, connector_pretraining (ZeRO 3)") == 1
    for row in ("projectors/decay", "qk_norms/no_decay", "language_model", "vision_tail"):
        assert sum(row in line for line in straight.splitlines()) == 1, row
    assert straight.count("no gradient reaches these parts of the vision encoder: block 4") == 1
    assert "next, modality_adaptation: deepspeed --num_accelerators 2 --module hive_ds.train --recipe" in straight


def test_metrics(tiny: TinyRun, straight: str) -> None:
    lines = tiny.metrics("straight", 1, "train")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert all(set(line) == {"event", "step", "time", *TRAIN_KEYS} for line in lines)
    rates = [1e-3 * factor for factor in map(Schedule(STEPS, warmup_ratio=0.25, min_lr_ratio=0.1).factor, range(STEPS))]
    assert (rates[0], rates[2]) == (pytest.approx(1e-3 / 3), 1e-3)
    for line, rate in zip(lines, rates, strict=True):
        assert list(line["lr"].values()) == pytest.approx([rate] * len(line["lr"]))
    assert lines[-1]["samples"] == 8 * STEPS
    assert lines[INTERVAL - 1]["bad_samples"] == len(BAD)
    assert lines[-1]["bad_samples"] == 2 * len(BAD)
    assert 0 < lines[INTERVAL - 1]["cut_samples"] < lines[-1]["cut_samples"]
    found = {sample["id"] for line in tiny.metrics("straight", 1, "bad_samples") for sample in line["samples"]}
    assert found == {f"s{number:03d}" for number in BAD}
    assert lines[-1]["eta_seconds"] == 0
    assert all(0 < line["mfu"] < 1 for line in lines)
    assert all(0 <= line["data_wait_share"] < 1 for line in lines)
    assert lines[-1]["loss"] < lines[0]["loss"]
    (begun,) = tiny.metrics("straight", 1, "start")
    assert (begun["hosts"], begun["versions"]["torch"]) == ([socket.gethostname()], version("torch"))
    validation = tiny.metrics("straight", 1, "validation")
    assert [line["step"] for line in validation] == [4, 8, 12]
    assert all(line["loss"] > 0 and line["text_loss"] > 0 for line in validation)
    saves = tiny.metrics("straight", 1, "checkpoint")
    assert [(line["step"], line["failed"]) for line in saves] == [(step, None) for step in (4, 8, 12)]
    assert all(0 < line["blocked_seconds"] <= line["seconds"] for line in saves)
    folder = next((tiny.root / "straight" / "stage1" / "tensorboard").rglob("events.*")).parent
    events = EventAccumulator(str(folder)).Reload().Scalars("train/loss")
    assert [event.value for event in events] == pytest.approx([line["loss"] for line in lines])


@pytest.mark.long  # the interpreter takes a minute over the warm-up
@pytest.mark.skipif(not tiles.INTERPRETED, reason="needs the Triton interpreter: TRITON_INTERPRET=1")
def test_triton_kernels_under_zero3(tiny: TinyRun, straight: str) -> None:
    """Kernels are warmed up before the first step, in a cache of this machine, and the step is the same."""
    assert "attention of 2 routed LLM layers: sdpa (no GPU)" in straight
    backends = ("--set", "model.attention_backend=triton", "--set", "model.text_attention_backend=triton")
    printed = tiny.train_forked(1, "triton", *backends, "--set", "stages.connector_pretraining.steps=1")
    assert printed.count("attention of 2 routed LLM layers: triton (asked for)") == 1
    assert printed.index("attention kernels are compiled") < printed.index("stage 1 is done")
    assert list(tiny.root.glob("tmp*/hive-triton-*/warm-up.lock"))
    found, expected = tiny.metrics("triton", 1, "train")[0], tiny.metrics("straight", 1, "train")[0]
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert found["grad_norms"] == pytest.approx(expected["grad_norms"], rel=1e-4)


def test_killed_and_resumed_equals_straight(tiny: TinyRun, straight: str) -> None:
    tiny.train_and_kill(1, "killed")
    assert not (tiny.root / "killed" / "stage1" / "DONE").exists()
    printed = tiny.train_forked(1, "killed", "--set", "training.profile=[10, 11]")
    assert f"resumed from {tiny.root / 'killed' / 'stage1' / 'checkpoints' / 'step-'}" in printed
    for event, keys in (("train", EQUAL_ACROSS_ATTEMPTS), ("validation", ("step", "loss", "text_loss"))):
        resumed = [{key: line[key] for key in keys} for line in tiny.metrics("killed", 1, event)]
        assert resumed == [{key: line[key] for key in keys} for line in tiny.metrics("straight", 1, event)]
    first, second = (weights(tiny.root / run / "stage1" / "model") for run in ("straight", "killed"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    expect_profile(tiny.root / "killed" / "stage1" / "profile", printed)


def expect_profile(folder: Path, printed: str) -> None:
    """Of two steps of ZeRO-3 on two ranks, a validation and a checkpoint before and after them."""
    (path,) = folder.glob("*.txt")
    assert path.name == "steps-000010-000011.txt"
    assert printed.count("Steps 10 to 11") == 1
    assert printed.count(f"{path}") == 1
    found = shares(path.read_text())
    work, part = found["work"], found["part"]
    assert sum(work.values()) == pytest.approx(100, abs=0.5)
    assert min(work.values()) > 0
    assert min(part[name] for name in ("encoder", "projectors", "LLM", "optimizer", "data", "communication")) > 0


def test_stopped_by_a_file_and_gone_on(tiny: TinyRun) -> None:
    folder = tiny.root / "stopped" / "stage1"
    folder.mkdir(parents=True)
    (folder / "STOP").touch()
    few = ("--set", "stages.connector_pretraining.steps=3", "--set", "stages.connector_pretraining.micro_batch_size=3")
    stopped = run_forked("hive_ds.train:main", tiny.arguments(1, "stopped", *few), tiny.environment(), 2, timeout=240)
    assert stopped.returncode == EXIT_STOPPED, stopped.stderr
    remedy = f"remove {folder / 'STOP'}, then the same command goes on from there"
    assert f"stopped after step 1 of 3; {remedy}" in stopped.stdout
    assert not (folder / "DONE").exists()
    assert (folder / "latest").read_text() == "step-000001"
    (folder / "STOP").unlink()
    printed = tiny.train_forked(1, "stopped", *few, ranks=1)
    assert "checkpoints/step-000001" in printed
    batch = "batch: 8 samples a step over {} ranks, each {} x micro-batch 2, for 3 does not divide {}"
    assert batch.format(2, 2, 4) in stopped.stdout
    assert batch.format(1, 4, 8) in printed
    assert "training.seed" not in printed
    assert [line["step"] for line in tiny.metrics("stopped", 1, "train")] == [1, 2, 3]
    assert [line["step"] for line in tiny.metrics("stopped", 1, "stop")] == [1]


def test_stages_follow_one_another(tiny: TinyRun, pretrained: dict[int, str]) -> None:
    base = {f"vision_encoder.{n}": t for n, t in weights(tiny.root / "encoder").items()}
    base |= {f"language_model.{n}": t for n, t in weights(tiny.root / "language_model").items()}
    after = weights(tiny.root / "straight" / "stage1" / "model")
    assert (
        groups_that_moved({n: t for n, t in base.items() if n in after}, after).items()
        >= {
            "language_model": {False},
            "routed_attention": {False},
        }.items()
    )
    for number, printed in pretrained.items():
        before, after = after, weights(tiny.root / "straight" / f"stage{number}" / "model")
        trains = {name: {name in stage_by_number(number).trains} for name in groups_that_moved(before, after)}
        assert groups_that_moved(before, after) == trains, number
        copied = 4 if number == 2 else 0
        assert f"copied {copied}" in printed
        assert "missing 0, unexpected 0" in printed
    # Half an epoch of 40 samples at 8 a step.
    assert len(tiny.metrics("straight", 2, "train")) == 2


def test_stages_4_and_5_judge_the_encoder(tiny: TinyRun, pretrained: dict[int, str]) -> None:
    """The encoder of stage 3 goes, frozen, into a Llava that stock transformers loads, its hash into the metrics."""
    run = tiny.root / "straight"
    encoder, states = folder_sha256(run / "stage3" / "model"), {}
    for number in (4, 5):
        tiny.train_forked(number, "straight")
        assert tiny.metrics("straight", number, "start")[0]["vision_sha256"] == encoder
        model = load_any(run / f"stage{number}" / "model")
        assert model.config.vision_sha256 == encoder == folder_sha256(run / "encoder")
        states[number] = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        lines = tiny.metrics("straight", number, "train")
        assert len(lines) == 2
        assert all(0 < line["mfu"] < 1 for line in lines)
    assert "next, vlm_alignment: deepspeed --num_accelerators 2 --module hive_ds.train" in pretrained[3]
    moved = groups_that_moved(states[4], states[5], cascaded_groups(model.last_vision_block))
    assert moved == {name: {name in stage_by_number(5).trains} for name in moved}
    stock = LlavaForConditionalGeneration.from_pretrained(run / "stage5" / "model", dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(run / "stage5" / "model")
    inputs = processor(images=Image.new("RGB", (9, 8)), text="<image>red square", return_tensors="pt")
    assert torch.isfinite(stock(input_ids=inputs["input_ids"], pixel_values=inputs["pixel_values"]).logits).all()


@pytest.mark.parametrize(
    ("stage", "options", "message"),
    [
        (1, ["--set", "data.train=/nowhere"], "data folder /nowhere: does not exist"),
        (  # before a model is looked for, which may be large
            1,
            ["--set", "data.validation=/nowhere", "--set", "model.vision_encoder=/nowhere"],
            "data folder /nowhere: does not exist",
        ),
        (1, ["--set", f"data.train={__file__}"], f"data folder {__file__}: is a file; expected a folder of MDS"),
        (1, ["--set", "model.vision_encoder=/nowhere"], "vision encoder folder /nowhere does not exist"),
        (2, [], "stage 2 starts from .*stage1/model, but .* is not finished"),
        (4, [], "stage 4 starts from .*stage3/model, but .* is not finished"),
        (6, [], "stage 6: expected one of 1"),
        ("finetuning", [], "stage finetuning: expected one of 1 .connector_pretraining., 2"),
        ("modality_adaptation", [], "stage 2 starts from .*stage1/model, but .* is not finished"),
        (1, ["--set", "stages.1.lr=1"], "unknown key stages.1 = .*; stage 1 is stages.connector_pretraining$"),
        (5, ["--set", "stages.vlm_instruction_tuning=null"], "recipe test has no stage vlm_instruction_tuning"),
        (1, ["--set", "training.ds_config=zero7"], "ds_config 'zero7': no such file"),
        (1, ["--set", "model.routes.vision_blocks=[1,9]"], "routes: vision block 9 is out of range"),
    ],
)
def test_wrong_input_is_one_line(
    tiny: TinyRun, one_rank: None, capsys: pytest.CaptureFixture[str], stage: str, options: list[str], message: str
) -> None:
    assert main(tiny.arguments(stage, "wrong", *options)) == 2
    errors = capsys.readouterr().err
    (line,) = [line for line in errors.splitlines() if "error" in line]
    assert re.match(f"error: {message}", line), line
    assert "Traceback" not in errors
    assert not list((tiny.root / "wrong").rglob("attempt")), "a run that trains there would end"


def test_checkpoint_of_another_run_is_refused(
    tiny: TinyRun, straight: str, one_rank: None, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny.root / "straight" / "stage1"
    (tiny.root / "unfinished").mkdir()
    shutil.copytree(folder, tiny.root / "unfinished" / "stage1", ignore=shutil.ignore_patterns("DONE"))
    assert main(tiny.arguments(1, "unfinished", "--set", "training.seed=1")) == 2
    assert "step-000012: it was written with seed 0, this run has 1; use a new run folder" in capsys.readouterr().err
    fewer = tiny.arguments(1, "unfinished", "--set", "stages.connector_pretraining.steps=6")
    ended = run_forked("hive_ds.train:main", fewer, tiny.environment(), 1, timeout=240)
    assert ended.returncode == 2, ended.stderr
    assert "its checkpoint has 12 steps, more than the stage's 6" in ended.stderr
    for name in ("attempt", "recipe.yaml", "ds_config.json"):  # of what the checkpoint was trained with
        assert (tiny.root / "unfinished" / "stage1" / name).read_text() == (folder / name).read_text(), name


def test_finished_stage_says_what_it_was_trained_with(
    tiny: TinyRun, straight: str, one_rank: None, capsys: pytest.CaptureFixture[str]
) -> None:
    others = ("stages.modality_adaptation.steps=1", "vlm.feature_block=-1")
    changes = [word for value in ("training.seed=1", *others) for word in ("--set", value)]
    assert main(tiny.arguments(1, "straight", *changes)) == 0
    done, *warnings = capsys.readouterr().out.splitlines()
    assert "is done already" in done
    assert warnings == ["warning: it was trained with recipe.training.seed = 0, not 1; a new run folder trains it anew"]
    assert "--recipe " + str(tiny.root / "recipe.yaml") + " --set training.seed=1 --set" in done
