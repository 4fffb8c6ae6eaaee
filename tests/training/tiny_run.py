"""A tiny run on disk: base models, MDS data of a few samples, and a recipe over them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from forked import run_forked
from ranks import PYTHONPATH
from tiny_data import make_image_processor, make_samples, make_tokenizer
from tiny_models import IMAGE_SIZE, tiny_encoder, tiny_language_model

from hive_ds.data.mds import write_mds
from hive_ds.data.schema import Sample, Turn

STEPS = 12
INTERVAL = 4
BAD, LONG = (2, 30), 10
"""Numbers of training samples that cannot be read, and of one that is cut: in the first two steps, and again later."""

RECIPE = """
name: test
description: tiny
model:
  vision_encoder: {root}/encoder
  language_model: {root}/language_model
  routes: {{vision_blocks: [1, 3], language_layers: [1, 3]}}
  gradient_checkpointing: true
data:
  {{train: {root}/train, validation: {root}/validation, text_validation: {root}/text, num_workers: 0, max_length: 64}}
stages:
  connector_pretraining:
    {{lr: 1e-3, global_batch_size: 8, micro_batch_size: 2, steps: {steps}, weight_decay: 0.1, warmup_ratio: 0.25,
     min_lr_ratio: 0.1}}
  modality_adaptation: {{lr: 1e-3, global_batch_size: 8, micro_batch_size: 4, epochs: 0.5}}
  vision_finetuning: {{lr: 1e-3, global_batch_size: 8, micro_batch_size: 4, steps: 2, vision_layer_decay: 0.5}}
  vlm_alignment: {{lr: 1e-3, global_batch_size: 8, micro_batch_size: 4, steps: 2, data: {{image_aspect: pad}}}}
  vlm_instruction_tuning:
    {{lr: 1e-3, global_batch_size: 8, micro_batch_size: 4, steps: 2, data: {{train: {root}/chat, template: chat,
    validation: null, text_validation: null}}}}
vlm: {{language_model: {root}/language_model}}
training:
  precision: fp32
  checkpoint_interval: {interval}
  validation_interval: {interval}
  validation_samples: 8
  tensorboard: true
"""


@dataclass(frozen=True)
class TinyRun:
    """The files, and commands on them."""

    root: Path

    @classmethod
    def make(cls, root: Path) -> TinyRun:
        """Write models, data and recipe."""
        tokenizer = make_tokenizer("llama3")
        tiny_encoder().save_pretrained(root / "encoder")
        make_image_processor(size=IMAGE_SIZE).save_pretrained(root / "encoder")
        tiny_language_model(vocab_size=len(tokenizer), tie_word_embeddings=True).save_pretrained(
            root / "language_model"
        )
        tokenizer.save_pretrained(root / "language_model")
        samples = make_samples(40)
        write_mds(_flawed(samples), root / "train")
        write_mds(samples[:10], root / "validation")
        write_mds([sample for sample in samples if not sample.images], root / "text")
        write_mds([_asked(sample) for sample in samples], root / "chat")
        write_mds([_question(sample) for sample in samples if len(sample.images) == 1][:5], root / "questions")
        (root / "recipe.yaml").write_text(RECIPE.format(root=root, steps=STEPS, interval=INTERVAL))
        return cls(root)

    def arguments(self, stage: int | str, run: str, *options: str) -> list[str]:
        """What follows the module's name; torchrun takes --run for its own."""
        recipe = str(self.root / "recipe.yaml")
        return ["--recipe", recipe, "--stage", str(stage), "--run-folder", str(self.root / run), *options]

    def command(
        self,
        stage: int,
        run: str,
        *options: str,
        launcher: str = "deepspeed",
        ranks: int = 2,
        module: str = "hive_ds.train",
    ) -> list[str]:
        """The command line of a stage."""
        binaries = Path(sys.executable).parent
        launch = {
            "deepspeed": [
                str(binaries / "deepspeed"),
                "--num_accelerators",
                str(ranks),
                "--master_port",
                str(_free_port()),
                "--module",
            ],
            "torchrun": [str(binaries / "torchrun"), "--nproc-per-node", str(ranks), "--standalone", "-m"],
        }[launcher]
        return [*launch, module, *self.arguments(stage, run, *options)]

    def train(
        self, stage: int, run: str, *options: str, plant: str | None = None, **launch: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run a stage to its end, or to the fault that is planted in it (see `planted`), as a user would start it."""
        env = self.environment()
        if plant:
            launch["module"] = "planted"
            env |= {"HIVE_PLANT": plant, "PYTHONPATH": PYTHONPATH}
        command = self.command(stage, run, *options, **launch)
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        with subprocess.Popen(command, env=env, start_new_session=True, **pipes) as process:
            try:
                output, errors = process.communicate(timeout=240)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                raise
        return subprocess.CompletedProcess(command, process.returncode, output, errors)

    def train_forked(self, stage: int, run: str, *options: str, ranks: int = 2) -> str:
        """Run a stage to its end on ranks that begin at once (see `forked`); what they printed."""
        arguments = self.arguments(stage, run, *options)
        done = run_forked("hive_ds.train:main", arguments, self.environment(), ranks, timeout=240)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def train_and_kill(self, stage: int, run: str) -> None:
        """Run a stage and kill every process of it, without warning, once its first checkpoint is there."""
        latest = self.root / run / f"stage{stage}" / "latest"
        arguments, env = self.arguments(stage, run), self.environment()
        done = run_forked("hive_ds.train:main", arguments, env, 2, timeout=240, kill_when=latest.exists)
        assert latest.exists(), f"ended before its first checkpoint\n{done.stdout}\n{done.stderr}"
        self._remove_shared_memory()

    def metrics(self, run: str, stage: int, event: str) -> list[dict]:
        """Lines of one kind."""
        text = (self.root / run / f"stage{stage}" / "metrics.jsonl").read_text()
        return [line for line in map(json.loads, text.splitlines()) if line["event"] == event]

    def _remove_shared_memory(self) -> None:
        """Remove what killed ranks left in /dev/shm: blocks with the number of one that names this run's data."""
        for block in Path("/dev/shm").glob("*_locals"):
            if str(self.root).strip("/").encode() in block.read_bytes():
                for other in block.parent.glob(f"{block.name.split('_')[0]}_*"):
                    other.unlink(missing_ok=True)

    def environment(self) -> dict[str, str]:
        """Own folders for streaming and Triton, and no variables of an outer launcher."""
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("LOCAL_", "WORLD_", "RANK"))}
        return {**clean, "TMPDIR": tempfile.mkdtemp(dir=self.root)}


def _flawed(samples: list[Sample]) -> list[Sample]:
    flawed = make_samples(len(samples), bad=BAD)
    long = Turn("assistant", "red square " * 40)
    flawed[LONG] = replace(samples[LONG], turns=(*samples[LONG].turns[:-1], long))
    return flawed


def _asked(sample: Sample) -> Sample:
    """A conversation of what may be an answer alone."""
    asked = sample.turns[0].role == "user"
    return sample if asked else replace(sample, turns=(Turn("user", "What is it?"), *sample.turns))


def _question(sample: Sample) -> Sample:
    """One whose text differs from sample to sample, as does its length."""
    answer = sample.turns[-1]
    return replace(sample, turns=(Turn("user", f"<image>{answer.content}?"), answer))


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
