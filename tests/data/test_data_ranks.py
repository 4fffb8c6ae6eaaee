"""The order of samples does not depend on how the global batch is split, nor on an interruption."""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from forked import run_forked
from shard_folders import write_samples
from tiny_data import flat, make_samples

from hive_ds.data.mds import write_mds

NUMBER, GLOBAL, STEPS = 22, 4, 14  # 22 samples: six steps an epoch, of which the last is filled up
BAD = (2, 3, 11)
UNREADABLE = (4, 5, 12, 21)
HELD_OUT = ((1, 4, 0), (1, 5, 2), (2, 1, 0), (2, 3, 2), (2, 16, 0))
"""Ranks, micro-batch and workers of validations; the last holds the folder in one batch, mostly of fillers."""


def launch(plan: list[dict], out: Path, size: int) -> list[dict]:
    """Run ``plan`` on ``size`` ranks; one result a rank."""
    plan_file = out.with_suffix(".plan")
    plan_file.write_text(json.dumps(plan))
    environment = os.environ | {"TMPDIR": str(out.parent)}
    done = run_forked("rank_main:main", [str(plan_file), str(out)], environment, size, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(out.with_suffix(f".{rank}").read_text()) for rank in range(size)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict]]:
    """All runs, by name: one result per rank."""
    root = tmp_path_factory.mktemp("ranks")
    write_mds(make_samples(NUMBER), root / "good")
    write_mds(make_samples(NUMBER, bad=BAD), root / "bad")
    good = {"folder": str(root / "good"), "global_batch": GLOBAL, "steps": STEPS}
    rest = {**good, "steps": STEPS - 8}
    write_mds([replace(sample, id=f"other-{sample.id}") for sample in make_samples(10)], root / "other")
    mixture = {str(root / "good"): 1, f"file://{root / 'other'}": 3.0}
    mixed = {"folder": mixture, "cache": str(root / "cache"), "global_batch": GLOBAL, "steps": 24}
    alone = [
        {"name": "1x4x1", "micro": 4, "workers": 0, "save_at": 8, **good},
        {"name": "1x2x2", "micro": 2, "workers": 2, "save_at": 8, **good},
        {"name": "1x4x1 resumed", "micro": 4, "workers": 2, "resume": "1x4x1", **rest},
        {"name": "mixed alone", "micro": 4, "workers": 2, "save_at": 12, **mixed},
        {"name": "bad alone", "micro": 2, "workers": 0, "max_bad_share": 1.0, **good, "folder": str(root / "bad")},
    ]
    pair = [
        {"name": "2x2x1", "micro": 2, "workers": 2, "save_at": 8, **good},
        {"name": "2x1x2", "micro": 1, "workers": 0, "save_at": 8, **good},
        {"name": "2x1x2 resumed", "micro": 1, "workers": 2, "resume": "2x2x1", **rest},
        {"name": "2x2x1 resumed", "micro": 2, "workers": 0, "resume": "1x2x2", **rest},
        {"name": "mixed", "micro": 1, "workers": 2, **mixed},
        {"name": "mixed resumed", "micro": 2, "workers": 0, "resume": "mixed alone", **mixed, "steps": 12},
        {"name": "bad", "micro": 2, "workers": 2, "max_bad_share": 1.0, **good, "folder": str(root / "bad")},
    ]
    # Unshuffled, two ranks read samples of even and of odd numbers: all the bad ones are on the second.
    write_mds(make_samples(NUMBER, bad=(1, 11)), root / "odd")
    odd = {"folder": str(root / "odd"), "global_batch": GLOBAL, "steps": 18, "shuffle": False, "max_bad_share": 1.0}
    even = {**good, "balance": True}
    alone += [
        {"name": "odd alone", "micro": 2, "workers": 2, "save_at": 8, **odd},
        {"name": "balanced alone", "micro": 1, "workers": 2, "save_at": 8, **even},
    ]
    pair += [
        {"name": "odd", "micro": 2, "workers": 2, "save_at": 8, **odd},
        {"name": "odd resumed", "micro": 2, "workers": 0, "resume": "odd", **odd, "steps": 10},
        {"name": "odd elsewhere", "micro": 1, "workers": 2, "resume": "odd alone", **odd, "steps": 10},
        {"name": "balanced", "micro": 1, "workers": 2, "save_at": 8, **even},
        {"name": "balanced resumed", "micro": 1, "workers": 0, "resume": "balanced", **even, "steps": STEPS - 8},
        {"name": "balanced mixture", "micro": 2, "workers": 0, **mixed, "balance": True},
    ]
    # In shards of a few samples: streaming would draw some again in the middle of the order.
    write_samples(root / "held out", make_samples(NUMBER, bad=UNREADABLE))
    for ranks, micro, workers in HELD_OUT:
        for first in (9, NUMBER, 1000):
            held_out = {"folder": str(root / "held out"), "first": first, "micro": micro, "workers": workers}
            (alone if ranks == 1 else pair).append({"name": f"{first} of {ranks} x {micro} x {workers}", **held_out})
    one = launch(alone, root / "one", 1)
    two = launch(pair, root / "two", 2)
    return {name: [result[name] for result in ranks] for ranks in (one, two) for name in ranks[0]}


def steps(results: list[dict]) -> list[list[str]]:
    """Samples of every step over all ranks, sorted."""
    return [sorted(flat(parts)) for parts in zip(*(result["steps"] for result in results), strict=True)]


@pytest.mark.parametrize("layout", ["1x2x2", "2x2x1", "2x1x2"])
def test_every_layout_sees_the_same_samples_in_every_step(runs: dict[str, list[dict]], layout: str) -> None:
    assert steps(runs[layout]) == steps(runs["1x4x1"])


@pytest.mark.parametrize("name", ["1x4x1 resumed", "2x1x2 resumed", "2x2x1 resumed"])
def test_resumed_run_goes_on_at_the_exact_sample(runs: dict[str, list[dict]], name: str) -> None:
    assert steps(runs[name]) == steps(runs["1x4x1"])[8:]


def test_epoch_holds_every_sample_and_is_shuffled_anew(runs: dict[str, list[dict]]) -> None:
    seen = steps(runs["1x4x1"])
    first, second = flat(seen[:6]), flat(seen[6:12])
    assert len(set(first)) == len(set(second)) == NUMBER
    assert first != second
    assert all(len(step) == GLOBAL for step in seen)


@pytest.mark.parametrize("first", [9, NUMBER, 1000])
def test_validation_takes_each_of_the_first_samples_once(runs: dict[str, list[dict]], first: int) -> None:
    places = range(min(first, NUMBER))
    expected = [sample.id for place, sample in enumerate(make_samples(NUMBER)[:first]) if place not in UNREADABLE]
    supervised = []
    for ranks, micro, workers in HELD_OUT:
        found = runs[f"{first} of {ranks} x {micro} x {workers}"]
        assert {part["batches"] for part in found} == {-(-len(places) // (ranks * micro))}
        assert sorted(flat(part["bad"] for part in found)) == [f"s{place:03d}" for place in UNREADABLE if place < first]
        by_id = [pair for part in found for pair in zip(part["ids"], part["labels"], strict=True)]
        assert sorted(name for name, _ in by_id) == sorted(expected)
        supervised.append(sorted(by_id))
    assert all(one == supervised[0] for one in supervised)


def test_ranks_read_disjoint_samples_and_take_equal_steps(runs: dict[str, list[dict]]) -> None:
    first, second = (flat(result["steps"][:5]) for result in runs["2x2x1"])
    assert len(first) == len(second) == 10
    assert len({*first, *second}) >= 19  # one sample of the first five steps at most is drawn twice
    assert [result["length"] for result in runs["2x2x1"]] == [6, 6]
    assert [result["length"] for result in runs["2x1x2"]] == [12, 12]


def test_saved_position_is_the_same_on_every_rank(runs: dict[str, list[dict]]) -> None:
    assert runs["2x2x1"][0]["state"] == runs["2x2x1"][1]["state"] == runs["1x4x1"][0]["state"]


def test_weighted_folders_have_their_shares_in_every_layout_and_after_resuming(runs: dict[str, list[dict]]) -> None:
    alone = steps(runs["mixed alone"])
    assert steps(runs["mixed"]) == alone
    assert steps(runs["mixed resumed"]) == alone[12:]
    for epoch in (alone[:8], alone[8:16], alone[16:]):  # 22 + 10 samples are 8 steps; a quarter comes from "good"
        seen = Counter(flat(epoch))
        others = {name: count for name, count in seen.items() if name.startswith("other-")}
        assert sum(others.values()) == 24
        assert set(others.values()) == {2, 3}
        assert len(others) == 10
        assert [count for name, count in seen.items() if name not in others] == [1] * 8
    assert set(flat(alone[:8])) != set(flat(alone[8:16]))


def test_bad_samples_are_replaced_alike_in_every_layout(runs: dict[str, list[dict]]) -> None:
    assert steps(runs["bad"]) == steps(runs["bad alone"])
    clean, mended = flat(steps(runs["1x4x1"])), flat(steps(runs["bad"]))
    names = {f"s{index:03d}" for index in BAD}
    assert not names & set(mended)
    bad = flat(result["bad"] for result in runs["bad"])
    # s002 is followed by another bad one, so both are named whenever s002 was due.
    due = {name: clean.count(name) for name in names}
    named = {name: [item["id"] for item in bad].count(name) for name in names}
    assert named == {**due, "s003": due["s003"] + due["s002"]}
    assert all("cannot be read" in item["reason"] for item in bad)


def test_ranks_take_equal_steps_when_one_has_all_the_bad_samples(runs: dict[str, list[dict]]) -> None:
    straight, alone = runs["odd"], steps(runs["odd alone"])
    assert straight[0]["bad"] == []
    # Three epochs; what is drawn again to fill an epoch may be bad, too.
    assert len(straight[1]["bad"]) in range(6, 13)
    assert [[len(step) for step in result["steps"]] for result in straight] == [[2] * 18] * 2
    assert steps(straight) == alone
    assert steps(runs["odd elsewhere"]) == alone[8:]
    for before, after in zip(straight, runs["odd resumed"], strict=True):
        assert after["steps"] == before["steps"][8:]


def test_balancing_keeps_the_samples_of_every_step(runs: dict[str, list[dict]]) -> None:
    expected = steps(runs["1x4x1"])
    assert steps(runs["balanced alone"]) == steps(runs["balanced"]) == expected
    assert steps(runs["balanced mixture"]) == steps(runs["mixed alone"])
    assert runs["balanced"][0]["steps"] != runs["2x1x2"][0]["steps"]
    for before, after in zip(runs["balanced"], runs["balanced resumed"], strict=True):
        assert after["steps"] == before["steps"][8:]
