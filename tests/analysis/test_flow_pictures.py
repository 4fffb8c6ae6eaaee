"""What the table and the plots of a flow say: signs, blocks and layers, and which blocks the LLM reads."""

from __future__ import annotations

from dataclasses import replace

import pytest
from matplotlib.figure import Figure

from hive_ds.analysis.flow import Flow
from hive_ds.analysis.flow_pictures import _draw_norms, _draw_routes, _draw_similarity

HIVE = Flow(
    name="HIVE",
    kind="hive",
    read_by={1: "layer 2", 2: "", 3: "layer 4"},
    loss=2.0,
    supervised_tokens=7,
    norms={1: 4.0, 2: 2.0},
    knocked_out={(1, 2): 2.5, (3, 4): 1.75},
    without_images=3.0,
    similarity={1: 0.9, 2: 0.8, 3: 0.7},
)
OTHER = replace(HIVE, name="other", knocked_out={(2, 4): 2.25}, without_images=2.125, norms={1: 1.0})
SA = replace(
    HIVE, name="SA", kind="cascaded", read_by={1: "", 2: "LLM input", 3: ""}, knocked_out={}, without_images=None
)


def test_the_table() -> None:
    assert HIVE.lines() == [
        "HIVE: loss 2.0000 over 7 supervised tokens",
        "  block  read by         gradient norm  CKA with initial",
        "  1      layer 2         4              0.9000",
        "  2                      2              0.8000",
        "  3      layer 4         no gradient    0.7000",
        "  without block 1 → layer 2: loss 2.5000 (+0.5000)",
        "  without block 3 → layer 4: loss 1.7500 (-0.2500)",
        "  without any route: loss 3.0000 (+1.0000)",
    ]
    assert [route["change"] for route in HIVE.values()["routes"]] == [0.5, -0.25]


def test_bars_are_what_a_hidden_route_adds_to_the_loss() -> None:
    axes = Figure().subplots()
    _draw_routes(axes, [HIVE, SA, OTHER])
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1→2", "3→4", "all", "2→4", "all"]
    assert [bar.get_height() for bar in axes.patches] == pytest.approx([0.5, -0.25, 1.0, 0.25, 0.125])
    assert [bar.get_center()[0] for bar in axes.patches] == pytest.approx([0, 1, 2, 3, 4])


def test_lines_stand_at_their_blocks_and_rings_where_the_llm_reads() -> None:
    for draw, values, read in ((_draw_norms, "norms", [[1], [2]]), (_draw_similarity, "similarity", [[1, 3], [2]])):
        axes = Figure().subplots()
        draw(axes, [HIVE, SA])
        lines, rings = axes.lines[::2], axes.lines[1::2]
        for flow, line in zip((HIVE, SA), lines, strict=True):
            assert dict(zip(*line.get_data(), strict=True)) == getattr(flow, values)
        assert [list(ring.get_xdata()) for ring in rings] == read
        assert lines[0].get_color() != lines[1].get_color()
        assert [line.get_color() for line in lines] == [ring.get_color() for ring in rings]
