"""FLOPs and bytes of each part of a step at the paper's size, and the least time that GPUs need (roofline.json).

    python docs/results/roofline.py docs/results/roofline.json

Counted on the meta device (`hive_ds.cost.traffic`); nothing is timed. `make docs` draws the picture.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from hive_ds.cost.model import meta_model
from hive_ds.cost.traffic import Traffic, count_traffic
from hive_ds.cost.workload import Workload
from hive_ds.planning.hardware import GPUS
from hive_ds.planning.timing import ADAM_BYTES
from hive_ds.recipe import load_recipe
from hive_ds.versions import made_with

RECIPE = "hive-siglip-l-mobilellm-600m"
CAPTION, LONG, LONG_BATCH = 64, 2048, 4
"""Text tokens of a sample, and samples where texts are long; with captions the recipe's micro-batch."""
ADAM_FLOPS = 14
"""Of an element: decay 1, first moment 3, second 4, denominator 3, update 3."""
NAMES = ("h200", "h100")


def rows_of(stage: int) -> list[dict[str, Any]]:
    """Every part of a micro-batch of captions and of long texts, and the optimizer, which runs once a step."""
    recipe = load_recipe(RECIPE)
    model, plan = meta_model(recipe, stage)
    batch = recipe.stages[plan.stage.name].micro_batch
    rows = []
    for workload in (Workload(batch, CAPTION), Workload(LONG_BATCH, LONG)):
        counted = count_traffic(model, workload)
        del counted["other"]  # embeddings and the order of image keys: below 1 % of the bytes
        setting = {"stage": stage, "batch": workload.batch, "text_length": workload.text_length}
        rows += [{**setting, "part": part, **_figures(traffic)} for part, traffic in counted.items()]
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    moved = float(ADAM_BYTES * trained)
    optimizer = _figures(Traffic(float(ADAM_FLOPS * trained), moved, moved), rate="fp32")
    return [*rows, {"stage": stage, "part": "optimizer", **optimizer}]


def _figures(traffic: Traffic, rate: str = "bf16") -> dict[str, Any]:
    floors = {
        name: {
            "products": 1e3 * traffic.flops / getattr(GPUS[name], rate),
            "memory": 1e3 * traffic.bytes / GPUS[name].memory_bandwidth,
            "memory_fused": 1e3 * traffic.fused / GPUS[name].memory_bandwidth,
        }
        for name in NAMES
    }
    return {**vars(traffic), "milliseconds_at_least": floors}


def main() -> None:
    """Count all three stages."""
    gpus = {name: {"flops": GPUS[name].bf16, "bytes": GPUS[name].memory_bandwidth} for name in NAMES}
    rows = [row for stage in (1, 2, 3) for row in rows_of(stage)]
    record = {**made_with(), "recipe": RECIPE, "per_second": gpus, "rows": rows}
    Path(sys.argv[1]).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
