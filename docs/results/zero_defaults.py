"""Which ZeRO profile and micro-batch `hive-ds plan` advises for models of four sizes: a table of docs/planning.md.

    python docs/results/zero_defaults.py      # prints the table

Everything is predicted; the sizes are those of published models, whose weights are not needed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from hive_ds.config import Recipe
from hive_ds.planning.hardware import GPUS, NETWORKS
from hive_ds.planning.plan import ProfilePlan, best_of, plan_profiles
from hive_ds.planning.stage_model import StageModel
from hive_ds.planning.timing import Assumptions, Cluster
from hive_ds.recipe import load_recipe

PAPER = "hive-siglip-l-mobilellm-600m"
NODES = (1, 4, 16)
"""Of 8 H100."""
STAGES, TEXT_LENGTH = (3, 5), 128
CONFIGS: dict[str, dict[str, Any]] = {
    "Qwen3-1.7B": {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16},
    "Qwen3-8B": {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32},
    "Qwen3-14B": {"hidden_size": 5120, "intermediate_size": 17408, "num_hidden_layers": 40, "num_attention_heads": 40},
}
"""arXiv 2505.09388, table 1, and the models' config.json. All have 8 heads of keys, of 128, and 151,936 tokens."""
SIZES = ("paper", *CONFIGS)
HEAD = (
    "| stage | model | parameters, trained | 8 H100 | 32 | 128 |",
    "|---|---|---|---|---|---|",
)


def recipe_of(size: str, folder: Path) -> Recipe:
    """The paper's recipe, or SigLIP-so400m under a larger LLM with a route at every fourth layer from the last."""
    if size == "paper":
        return load_recipe(PAPER)
    config = AutoConfig.for_model(
        "qwen3",
        **CONFIGS[size],
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151936,
        tie_word_embeddings=size == "Qwen3-1.7B",
    )
    config.save_pretrained(folder / size)
    last = config.num_hidden_layers - 1
    layers = [last - 4 * step for step in reversed(range(7))]
    overrides = [
        "model.vision_encoder=google/siglip-so400m-patch14-384",
        f"model.language_model={folder / size}",
        f"vlm.language_model={folder / size}",
        "model.routes.vision_blocks=[2, 6, 10, 14, 18, 22, 26]",
        f"model.routes.language_layers={layers}",
    ]
    return load_recipe(PAPER, overrides)


def row_of(stage: int, size: str) -> str:
    """The line of a model in a stage."""
    with tempfile.TemporaryDirectory() as folder:
        model = StageModel.of(recipe_of(size, Path(folder)), stage, TEXT_LENGTH)
    name = f"SigLIP-so400m, {size}"
    if size == "paper":
        name = f"the paper's: SigLIP-L, {'MobileLLM-600M' if stage == 3 else 'Qwen2-0.5B'}"
    cells = [_cell(plans) for plans in _plans(model)]
    return f"| {stage} | {name} | {model.parameters / 1e9:.1f}B, {model.trained / 1e9:.1f}B | {' | '.join(cells)} |"


def _plans(model: StageModel) -> Iterator[list[ProfilePlan]]:
    for nodes in NODES:
        cluster = Cluster(nodes, 8, GPUS["h100"], NETWORKS["ib400x8"])
        divides = model.config.global_batch_size % cluster.ranks == 0
        yield plan_profiles(model, cluster, Assumptions()) if divides else []


def _cell(plans: list[ProfilePlan]) -> str:
    if not plans:
        return "more GPUs than samples"
    best = best_of(plans)
    if best is None:
        return "none fits"
    batch = f"{best.micro_batch} x {best.accumulation}"
    return f"`{best.profile}`, {batch}, {best.peak / 1e9:.0f} GB, {best.samples_per_second:,.0f} images/s"


if __name__ == "__main__":
    print("\n".join([*HEAD, *(row_of(stage, size) for stage in STAGES for size in SIZES)]))
