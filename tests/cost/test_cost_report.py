"""The printed table of costs and the picture of the claims: units, shares, and which values a panel shows."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hive_ds.cost import pictures
from hive_ds.cost.ledger import StageCost
from hive_ds.cost.report import print_costs
from hive_ds.cost.tables import _longest_saving

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results" / "cost_paper.json"
FLOPS = {"vision_encoder": 2e12, "projectors": 1e12, "language_model": 4e12, "head": 1e12}
MEMORY = dict.fromkeys(("parameters", "gradients", "optimizer", "activations", "temporaries", "zero_buffers"), 10**9)
OURS = StageCost(
    recipe="ours",
    stage=1,
    name="connector_pretraining",
    batch=2,
    text_length=8,
    global_batch=32,
    ranks=4,
    policy="zero1",
    precision="bf16",
    gradient_checkpointing=False,
    model_flops=FLOPS,
    hardware_flops=12e12,
    counted_model_flops=8e12,
    counted_hardware_flops=12e12,
    memory=MEMORY,
    host_memory=0,
    sent={"weights": 3e9, "gradients": 1e9},
)


def test_the_table_is_by_sample_and_says_what_the_first_is_of_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    twice = {part: 2 * flops for part, flops in FLOPS.items()}
    sent, memory = {"weights": 0.0, "gradients": 4e9}, {name: 4 * size for name, size in MEMORY.items()}
    print_costs([OURS, replace(OURS, recipe="SA", model_flops=twice, hardware_flops=16e12, sent=sent, memory=memory)])
    lines = capsys.readouterr().out.splitlines()
    cells = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines if line.startswith("│")]
    rows = {row[0]: row[1:] for row in cells}
    assert rows["TFLOPs a sample: LLM, image keys included"] == ["2", "4", "0.500"]
    assert rows["all (model FLOPs)"] == ["4", "8", "0.500"]
    assert rows["with what backward repeats (HFU)"] == ["6", "8", "0.750"]
    assert rows["PFLOPs an optimizer step, all ranks"] == ["0.128", "0.256", "0.500"]
    assert rows["peak"] == ["6", "24", "0.250"]
    assert rows["GB a rank sends in a step: weights"] == ["3", "0", ""]
    assert rows["GB a rank sends in a step: gradients"] == ["1", "4", "0.250"]


def test_a_claim_on_memory_holds_where_it_does_rounded() -> None:
    """The paper says 59.3 %."""
    saved = {8: 0.61, 16: 0.5926, 32: 0.5924, 64: 0.1}
    points = [{"text_length": length, "saved": {"one GPU": share}} for length, share in saved.items()]
    assert _longest_saving(points, "one GPU") == 16
    assert _longest_saving(points[2:], "one GPU") == 0


def test_panels_show_what_their_titles_say(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: dict[str, dict[str, list[float]]] = {}
    finish = pictures._finish

    def record(axes: Any, title: str, *more: Any) -> None:
        drawn[title] = {line.get_label(): list(line.get_ydata()) for line in axes.lines}
        finish(axes, title, *more)

    monkeypatch.setattr(pictures, "_finish", record)
    curves = json.loads(RESULTS.read_text())["curves"]
    pictures.draw(curves)
    for stage, routes in ((1, 8), (2, 6), (3, 8)):
        flops, memory = (
            [point for point in curves[kind] if (point["stage"], point["routes"]) == (stage, routes)]
            for kind in ("flops", "memory")
        )
        name = f"stage {stage}, {routes} routes"
        assert drawn["Encoder not counted"][name] == [point["ratio_without_encoder"] for point in flops]
        assert drawn["Encoder counted: bound on speed"][name] == [1 / point["ratio"] for point in flops]
        saved = {(point["batch"], point["text_length"]): 100 * point["saved"]["one GPU"] for point in memory}
        by_length = [saved[32, length] for length in (32, 64, 128, 256, 512, 1024, 2048)]
        assert drawn["Memory, one GPU, batch 32"][name] == by_length
        assert drawn["Memory, one GPU, 64 text tokens"][name] == [saved[batch, 64] for batch in (1, 4, 32)]
