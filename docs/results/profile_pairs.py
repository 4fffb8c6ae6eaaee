"""Profiles of a micro-batch of the quickstart before and after each optimisation, one process on one core.

    python docs/results/cpu_step.py TREE WORK                 # makes WORK/base, models and data of the quickstart
    OMP_NUM_THREADS=1 python docs/results/profile_pairs.py WORK/base --out docs/results/profile_pairs.json

"Before" is today's code with one thing undone. Both are run in turn; CPU seconds are those of the fastest round without
the profiler, shares those of one profiled round. A compiled form is one more "after".
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile, record_function

import hive_ds.kernels.finish as finishing
from hive_ds.constants import IGNORE_INDEX
from hive_ds.cost.model import random_model
from hive_ds.data.batch import PackedBatch
from hive_ds.data.loader import build_loader
from hive_ds.kernels import rectangles
from hive_ds.model import inputs
from hive_ds.model.compiling import compile_blocks
from hive_ds.model.vision import encode_images, vision_blocks
from hive_ds.processing import HiveProcessor
from hive_ds.recipe import load_recipe
from hive_ds.training.groups import adamw
from hive_ds.training.parts import Marked
from hive_ds.training.profile import STEP, kinds_of_work
from hive_ds.versions import made_with

BATCHES, ROUNDS, WARM_UP = 8, 4, 2
CPU = torch.device("cpu")


@dataclass
class Setting:
    """What one form of the step runs on."""

    model: Any
    batches: list[PackedBatch]
    fused: bool = True


@dataclass(frozen=True)
class Case:
    """An optimisation that is undone, or done, to a setting."""

    name: str
    stage: int
    before: Callable[[Setting], None] = lambda setting: None
    after: Callable[[Setting], None] = lambda setting: None
    before_overrides: tuple[str, ...] = ()


def gradients_of_a_frozen_encoder(setting: Setting) -> None:
    """The encoder, outside of the optimizer, records and gets gradients all the same."""
    setting.model.vision_encoder.requires_grad_(True).train()


def all_blocks(setting: Setting) -> None:
    """Blocks behind the last routed one run, too."""

    def encode(encoder: Any, blocks: Any, *arguments: Any, **options: Any) -> Any:
        return encode_images(encoder, [*blocks, len(vision_blocks(encoder))], *arguments, **options)

    inputs.encode_images = encode


def padding(setting: Setting) -> None:
    """Each text as long as the longest of its batch."""
    setting.batches = [_padded(batch) for batch in setting.batches]


def _padded(batch: PackedBatch) -> PackedBatch:
    longest = max(batch.text_lengths)

    def pad(values: torch.Tensor, fill: int) -> torch.Tensor:
        parts = values.split(batch.text_lengths)
        return torch.cat([F.pad(part, (0, longest - len(part)), value=fill) for part in parts])

    ids, labels = pad(batch.input_ids, 0), pad(batch.labels, IGNORE_INDEX)
    return replace(batch, input_ids=ids, labels=labels, text_lengths=[longest] * len(batch.text_lengths))


def whole_last_layer(setting: Setting) -> None:
    """The last layer's output projection and MLP see every token."""
    decode = setting.model._decode

    def whole(text: Any, images: Any, cache: Any, rows: torch.Tensor) -> torch.Tensor:
        return decode(text, images, cache)[rows]

    setting.model._decode = whole


def every_logit(setting: Setting) -> None:
    """So does the head."""
    decode, head = setting.model._decode, setting.model.language_model.lm_head
    kept: list[torch.Tensor] = []

    def whole(text: Any, images: Any, cache: Any, rows: torch.Tensor) -> torch.Tensor:
        kept[:] = head(decode(text, images, cache)), rows
        return kept[0]

    def loss(_: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits, rows = kept
        return F.cross_entropy(logits.float()[rows], targets, reduction="sum")

    setting.model._decode, setting.model.language_loss = whole, LossOf(loss)


class LossOf(torch.nn.Module):
    """A function in the place of a module."""

    def __init__(self, function: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.forward = function


def plain_adamw(setting: Setting) -> None:
    """AdamW by one operator for each kind of work."""
    setting.fused = False


def one_rectangle(setting: Setting) -> None:
    """All samples of a batch are padded to the longest for attention."""
    _in_forward(setting, rectangles, "PAIRS_OF_A_RUN", 2**60)


def rotation_by_halves(setting: Setting) -> None:
    """Queries and keys are rotated half by half."""

    def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        cos, sin = (table[:, None, : x.shape[-1] // 2].to(x.dtype) for table in (cos, sin))
        low, high = x.chunk(2, dim=-1)
        return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)

    _in_forward(setting, finishing, "_rotate", rotate)


def _in_forward(setting: Setting, module: Any, name: str, value: Any) -> None:
    """Put ``value`` in the place of a module's ``name`` while the model of this form runs forward."""
    usual = getattr(module, name)
    setting.model.register_forward_pre_hook(lambda *_: setattr(module, name, value))
    setting.model.register_forward_hook(lambda *_: setattr(module, name, usual))


CASES = (
    Case("frozen encoder: no gradients, evaluation mode", 1, gradients_of_a_frozen_encoder),
    Case("blocks after the last routed one not run", 1, all_blocks),
    Case("no padding", 3, padding),
    Case("last layer at supervised tokens only", 3, whole_last_layer),
    Case("last layer and logits at supervised tokens only", 3, every_logit),
    Case("attention by a fused CPU kernel", 3, before_overrides=("model.attention_backend=reference",)),
    Case("attention: texts of about one length share a rectangle", 3, one_rectangle),
    Case("rotation over whole rows", 3, rotation_by_halves),
    Case("fused AdamW", 3, plain_adamw),
    Case("torch.compile, Inductor", 3, after=lambda setting: compile_blocks(setting.model, CPU, torch.float32)),
)


class Steps:
    """One form, ready to run."""

    def __init__(self, base: Path, case: Case, *, before: bool) -> None:
        overrides = case.before_overrides if before else ()
        recipe = load_recipe("tiny", [*overrides, *_models(base)])
        torch.manual_seed(0)
        model, plan = random_model(recipe, case.stage, CPU)
        self.setting = Setting(model, load(base, recipe))
        (case.before if before else case.after)(self.setting)
        config = recipe.stages[plan.stage.name]
        self.optimizer = adamw(plan.groups, config, fused=self.setting.fused)
        self.encode = inputs.encode_images
        inputs.encode_images = encode_images

    def run(self) -> float:
        """CPU seconds of a step, mean of all batches."""
        start = time.process_time()
        inputs.encode_images = self.encode
        for batch in self.setting.batches:
            with record_function(STEP):
                self.setting.model(**batch.model_inputs(CPU, torch.float32)).loss.backward()
                with record_function("part:optimizer"):
                    self.optimizer.step()
                self.setting.model.zero_grad()
        inputs.encode_images = encode_images
        return (time.process_time() - start) / len(self.setting.batches)

    def profile(self) -> dict[str, float]:
        """Shares of a profiled round."""
        with Marked(self.setting.model), profile(activities=[ProfilerActivity.CPU]) as trace:
            self.run()
        return kinds_of_work(list(trace.events()), cuda=False)


def _models(base: Path) -> list[str]:
    return [f"model.{name}={base / 'base' / name}" for name in ("vision_encoder", "language_model")]


def load(base: Path, recipe: Any) -> list[PackedBatch]:
    """The first batches of the quickstart's training data."""
    processor = HiveProcessor.from_base_models(base / "base" / "vision_encoder", base / "base" / "language_model")
    loader = build_loader(
        replace(recipe.data, train=str(base / "data" / "train"), num_workers=0),
        processor.tokenizer,
        processor.image_processor,
        micro_batch_size=16,
        global_batch_size=16,
        seed=0,
        train=True,
    )
    return list(islice(iter(loader), BATCHES))


def measure(base: Path, case: Case) -> dict[str, Any]:
    """Both forms of a case."""
    forms = {"before": Steps(base, case, before=True), "after": Steps(base, case, before=False)}
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(WARM_UP + ROUNDS):
        for name, form in forms.items():
            seconds[name].append(form.run())
    return {
        "case": case.name,
        "stage": case.stage,
        **{
            name: {"cpu_seconds": min(seconds[name][WARM_UP:]), "shares": form.profile()}
            for name, form in forms.items()
        },
    }


def main() -> None:
    """Measure every case and print the table of the lab log."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("base", type=Path, help="folder `base` of cpu_step.py")
    parser.add_argument("--cases", nargs="+", type=int, default=list(range(len(CASES))))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = [measure(options.base.resolve(), CASES[number]) for number in options.cases]
    for row in rows:
        for form in ("before", "after"):
            shares = " | ".join(f"{100 * share:.0f}" for share in row[form]["shares"].values())
            print(f"| {row['case']} | {form} | {1e3 * row[form]['cpu_seconds']:.1f} | {shares} |")
    if options.out:
        options.out.write_text(json.dumps({**made_with(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
