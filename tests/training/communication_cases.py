"""Runs whose communication is counted, and what planning predicts for them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from message_counter import tally

from hive_ds.planning.communication import ZeroPolicy
from hive_ds.planning.stage_model import StageModel
from hive_ds.recipe import load_recipe
from hive_ds.training.ds_config import read_policy
from hive_ds.training.global_batch import fit_micro_batch

LARGE_MODEL = {
    "stage3_param_persistence_threshold": 500,
    "stage3_prefetch_bucket_size": 5000,
    "stage3_max_reuse_distance": 20_000,
    "reduce_bucket_size": 20_000,
    "sub_group_size": 10_000,
}
"""Limits that are to the tiny model what DeepSpeed's are to a large one: weights come and go, buckets overflow."""


@dataclass(frozen=True)
class Case:
    """One counted run."""

    stage: int
    policy: str
    large: bool = False
    """With `LARGE_MODEL`'s limits."""
    precision: str = "fp32"
    recompute: bool = True
    """Under gradient checkpointing."""
    per_copy: int = 0
    """hpZ's ranks per copy of the weights; 0 leaves the file's."""

    @property
    def name(self) -> str:
        """For people."""
        marks = (("large", self.large), ("stored", not self.recompute), (f"hpz{self.per_copy}", self.per_copy))
        return " ".join([f"stage{self.stage}", self.policy, self.precision, *(mark for mark, on in marks if on)])

    def settings(self) -> dict[str, Any]:
        """What it changes in ``zero_optimization``."""
        copy = {"zero_hpz_partition_size": self.per_copy} if self.per_copy else {}
        return copy | (LARGE_MODEL if self.large else {})

    def file(self, folder: Path) -> str:
        """Its policy as a file in ``folder``; the first rank to ask for it writes it."""
        path = folder / f"{self.name.replace(' ', '-')}.json"
        if not path.exists():
            policy = read_policy(self.policy)
            policy["zero_optimization"] |= self.settings()
            path.write_text(json.dumps(policy))
        return str(path)

    def overrides(self, folder: Path) -> list[str]:
        """What it changes in the recipe."""
        return [
            f"training.ds_config={self.file(folder)}",
            f"training.precision={self.precision}",
            f"model.gradient_checkpointing={str(self.recompute).lower()}",
        ]


FIRST = (Case(1, "zero3"), Case(2, "zero3", large=True))
"""They also train what the others start from."""
SCALED = (FIRST[0], Case(1, "zero2"), Case(1, "zero0"))
"""Those that 8 ranks run too."""
CASES = (
    *FIRST,
    *SCALED[1:],
    *(Case(3, policy) for policy in ("zero0", "zero1", "zero2", "zero3")),
    *(Case(3, policy, precision="bf16") for policy in ("zero0", "zero1", "zero2")),
    *(Case(3, f"zero3_offload_{what}", large=True) for what in ("optimizer", "param")),
    Case(3, "zero2", large=True),
    Case(3, "zero3", large=True, precision="bf16"),
    Case(3, "zero3", large=True, recompute=False),
    Case(3, "zero3_hpz", large=True, per_copy=2),
    Case(3, "zero3_hpz", large=True, per_copy=2, recompute=False),
)

QUICK = (
    *FIRST,
    Case(3, "zero1"),
    Case(3, "zero2", precision="bf16"),
    Case(3, "zero3_offload_param", large=True),
    Case(3, "zero3_hpz", large=True, per_copy=2, recompute=False),
)
"""Each way of communicating once."""


def predicted(case: Case, folder: Path, num_ranks: int) -> dict[str, dict[str, float]]:
    """The tally that planning expects of ``case`` on the tiny run of ``folder``."""
    recipe = load_recipe(folder / "recipe.yaml", case.overrides(folder))
    model = _model(folder, case.stage, case.precision, case.recompute)
    config = fit_micro_batch(model.config, num_ranks)
    micro_batches = config.global_batch_size // (config.micro_batch_size * num_ranks)
    policy = ZeroPolicy.of(read_policy(recipe.training.ds_config), num_ranks, num_ranks)
    return tally(model.messages(policy, num_ranks, micro_batches).all)


@lru_cache
def _model(folder: Path, stage: int, precision: str, recompute: bool) -> StageModel:
    """It does not depend on the policy."""
    overrides = [f"training.precision={precision}", f"model.gradient_checkpointing={str(recompute).lower()}"]
    return StageModel.of(load_recipe(folder / "recipe.yaml", overrides), stage, text_length=8)
