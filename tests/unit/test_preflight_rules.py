"""Which nodes the preflight leaves out, by what they have said; real nodes are in tests/cluster/test_preflight.py."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from full_disk import full_disk

from hive_ds.launch import preflight, preflight_network
from hive_ds.launch.preflight_verdict import compare_nodes, judge_links, links

A, B, C, D, E = nodes = [f"node{name}" for name in "ABCDE"]


def facts(**changes: Any) -> dict[str, Any]:
    return {"versions": {"torch": "2.10", "python": "3.11.2"}, "skew": 0.01, **changes}


def test_equal_nodes_have_no_fault() -> None:
    rates = {A: [7.0e14, 7.2e14], B: [6.8e14, 5.2e14]}  # 0.75 of the median is no fault
    assert compare_nodes({node: facts(matmul_flops_per_second=rates[node]) for node in rates}) == {}
    assert compare_nodes({A: facts()}) == {}


def test_node_that_differs_is_named() -> None:
    assert compare_nodes({A: facts(skew=0.0), B: facts(), C: facts(versions={"torch": "2.9", "python": "3.11.2"})}) == {
        C: ["torch is 2.9, but 2.10 on other nodes"]
    }
    first_is_off = {A: facts(skew=0.0), B: facts(skew=-60.0), C: facts(skew=-60.2)}
    assert compare_nodes(first_is_off) == {A: ["its clock is +60 s off the others'"]}
    assert list(compare_nodes({A: facts(skew=0.0), B: facts(skew=4.9), C: facts(skew=-5.1)})) == [C]
    slow = {A: [7e14, 7e14], B: [7e14, 3e14]}
    assert compare_nodes({node: facts(matmul_flops_per_second=slow[node]) for node in slow}) == {
        B: ["GPU 1 does 300 TFLOP/s; the median is 700"]
    }


@pytest.mark.parametrize("count", [2, 3, 4, 5, 8, 9])
def test_every_node_has_its_neighbours_one_at_a_time(count: int) -> None:
    ring = links(count)
    assert len(ring) == (1 if count == 2 else count)
    for turn in {turn for *_, turn in ring}:
        busy = [node for a, b, when in ring if when == turn for node in (a, b)]
        assert len(busy) == len(set(busy))
    assert all(sum(node in link[:2] for link in ring) == min(2, count - 1) for node in range(count))


@pytest.mark.parametrize(
    ("rates", "left_out"),
    [
        ([1e9, 1e9, 3e9, 1e9, 1e9], {}),
        ([None, None, 1e9, 1e9, 1e9], {B: "network: nodeA not reached and nodeC not reached; the median is 1.00 GB/s"}),
        ([1e8, 1e8, 1e9, 1e9, 1e9], {B: "network: nodeA at 0.10 GB/s and nodeC at 0.10 GB/s; the median is 1.00 GB/s"}),
        ([1e9, 1e8, 1e9, 1e9, 1e9], {}),
        ([2.1e8, 2.1e8, 1e9, 1e9, 1e9], {}),  # slow, but not broken
        ([1e9, 1e9, None, 1e9, 1e9], {D: "network: nodeC not reached, or does not reach it"}),
    ],
)
def test_bad_node_of_a_ring_is_named(rates: list[float | None], left_out: dict[str, str]) -> None:
    assert judge_links(nodes, rates) == left_out


def test_where_nothing_goes_through_all_are_out() -> None:
    assert judge_links([A, B], [None]) == {A: "network: nodeB not reached", B: "network: nodeA not reached"}
    assert set(judge_links(nodes, [None] * 5)) == set(nodes)


def test_matrix_product_is_timed_and_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(preflight.time, "perf_counter", iter([0.0, 5.0, 10.0, 12.0, 20.0, 20.5, 30.0, 31.0]).__next__)
        assert preflight._matmul(torch.device("cpu"), size=256) == 2 * 256**3 / 0.5  # the best of four
    monkeypatch.setattr(torch, "ones", lambda *size, **options: torch.full(size, 1.01, **options))
    with pytest.raises(RuntimeError, match="a matrix product is wrong"):
        preflight._matmul(torch.device("cpu"), size=256)


def test_folders_that_are_nearly_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = {"/dev/shm": 2e9, str(tmp_path): 10**9}
    monkeypatch.setattr(preflight, "free", free.get)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda folder: SimpleNamespace(free=free[str(folder)]))

    def faults(ranks: int) -> list[str]:
        options = argparse.Namespace(ranks=ranks, gpus=0, scratch=tmp_path, run=tmp_path)
        return preflight.check_node(options)[1]

    assert faults(8) == []
    assert faults(9) == ["/dev/shm has 2.00 GB; 9 ranks need 2.25 GB"]
    free |= {"/dev/shm": None, str(tmp_path): 10**9 - 10**7}
    full = f"{tmp_path} has 0.99 GB free; expected 1.00 GB"
    assert faults(1) == ["/dev/shm has nothing that can be written to; 1 ranks need 0.25 GB", full, full]


def test_node_without_its_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setenv("SLURMD_NODENAME", "node1")
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    folders = ("--out", str(tmp_path), "--run", str(tmp_path), "--scratch", str(tmp_path / "none"))
    assert preflight.main(["node", "--ranks", "0", "--gpus", "8", *folders]) == 0
    assert (tmp_path / "node1.fault").read_text().splitlines() == [
        f"cannot write to {tmp_path}/none: No such file or directory",
        "0 GPUs work of 8",
    ]
    assert json.loads((tmp_path / "node1.json").read_text())["run_free"] > 0
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")  # where nobody trains on them
    assert preflight.main(["node", "--ranks", "0", "--gpus", "8", *folders]) == 0
    assert len((tmp_path / "node1.fault").read_text().splitlines()) == 1


def test_each_gpu_that_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that work are timed; fewer than there should be are a fault, whatever they do."""

    def product(device: torch.device) -> float:
        if device.index == 1:
            raise RuntimeError("CUDA error: uncorrectable ECC error\nCompile with ...")
        return 1e12 + device.index

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(preflight, "_matmul", product)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    values, faults = preflight.check_node(argparse.Namespace(ranks=0, gpus=4, scratch=tmp_path, run=tmp_path))
    assert values["matmul_flops_per_second"] == [1e12, 1e12 + 2]
    assert faults == ["3 GPUs work of 4", "GPU 1: CUDA error: uncorrectable ECC error"]
    values, faults = preflight.check_node(argparse.Namespace(ranks=0, gpus=2, scratch=tmp_path, run=tmp_path))
    assert faults == ["GPU 1: CUDA error: uncorrectable ECC error"]


def test_a_folder_over_its_quota(tmp_path: Path) -> None:
    """Its disk has room."""
    with full_disk(1000):
        assert preflight.try_to_write(tmp_path) == (None, f"cannot write to {tmp_path}: File too large")


def test_the_network_part_is_told_of_all_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(preflight_network, "check_network", lambda *given: asked.append(given))
    given = ["network", "--nodes", "n1,n2,n3", "--port", "12345", "--out", str(tmp_path)]
    assert preflight.main(given) == 0
    assert asked == [(tmp_path, ["n1", "n2", "n3"], 12345)]
