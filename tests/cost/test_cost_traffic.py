"""FLOPs and bytes by part: against sums by hand, PyTorch's own count, and the result file of the roofline."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from cost_recipes import tiny_recipe
from torch import nn

from hive_ds.cost.counted import count_step
from hive_ds.cost.model import meta_model
from hive_ds.cost.traffic import PARTS, TrafficWatch, count_traffic
from hive_ds.cost.workload import Workload
from hive_ds.recipe import load_recipe

RESULT = Path(__file__).resolve().parents[2] / "docs" / "results" / "roofline.json"


class Tower(nn.Module):
    """A projector and a head, by the names that models give them."""

    def __init__(self) -> None:
        super().__init__()
        self.projectors = nn.Linear(3, 5, bias=False)
        self.lm_head = nn.Sequential(nn.GELU(), nn.Linear(5, 7, bias=False))

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.projectors(value))


def test_bytes_are_those_of_sums_by_hand() -> None:
    tower, value = Tower().to("meta"), torch.empty(2, 3, device="meta")
    with TrafficWatch(tower) as watch:
        tower(value).backward(torch.empty(2, 7, device="meta"))
    projectors, head = watch.parts["projectors"], watch.parts["head and loss"]
    forward, weight = 4 * (2 * 3 + 3 * 5 + 2 * 5), 4 * (2 * 3 + 2 * 5 + 3 * 5)  # the value asks for no gradient
    assert (projectors.flops, projectors.fused, projectors.bytes) == (
        2 * 2 * 2 * 15,
        forward + weight,
        forward + weight,
    )
    products = 3 * 4 * (2 * 5 + 5 * 7 + 2 * 7)
    gelu, gelu_backward = 4 * (10 + 10), 4 * (10 + 10 + 10)
    assert (head.flops, head.fused, head.bytes) == (3 * 2 * 2 * 35, products, products + gelu + gelu_backward)
    assert sum(part.bytes for part in watch.parts.values()) == projectors.bytes + head.bytes


@pytest.mark.parametrize("name", ["tiny", "tiny-sa"])
@pytest.mark.parametrize("checkpointing", ["false", "true"])
def test_flops_are_those_that_pytorch_counts(name: str, checkpointing: str, tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, name, f"model.gradient_checkpointing={checkpointing}")
    model, _ = meta_model(recipe, 3)
    workload = Workload(3, 11)
    parts = count_traffic(model, workload)
    assert sum(part.flops for part in parts.values()) == count_step(model, workload).hardware_flops
    assert [part for part in PARTS if not parts[part].flops] == ["other"]
    assert all(traffic.fused <= traffic.bytes for traffic in parts.values())


def test_the_result_file_is_what_is_counted() -> None:
    rows = [row for row in json.loads(RESULT.read_text())["rows"] if row["stage"] == 3 and row.get("text_length") == 64]
    recipe = load_recipe("hive-siglip-l-mobilellm-600m")
    counted = count_traffic(meta_model(recipe, 3)[0], Workload(rows[0]["batch"], 64))
    for row in rows:
        found = counted[row["part"]]
        wanted = (row["flops"], row["bytes"], row["fused"])
        assert (found.flops, found.bytes, found.fused) == pytest.approx(wanted, rel=0.01), row["part"]
