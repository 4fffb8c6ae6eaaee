"""Folders of runs that never were, as training writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hive_ds.recipe import dump_recipe, load_recipe

VERSIONS = {"hive-ds": "9.9", "torch": "2.99.0"}


def start(step: int, **more: Any) -> dict[str, Any]:
    machine = {"ranks": 2, "device": "NVIDIA H200", "matmul_flops_per_second": 1e12, "hosts": ["node1", "node2"]}
    return {"event": "start", "step": step, "time": 1.8e9 + step, **machine, "versions": VERSIONS, **more}


def train(step: int, steps: int, **more: Any) -> dict[str, Any]:
    line = {
        "loss": 5.0 - 3.0 * step / steps,
        "lr": {"projectors/decay": 1e-3, "projectors/no_decay": 1e-3, "vision_encoder": 1e-5 * step},
        "grad_norm": 1.0,
        "grad_norms": {"projectors": 1.0, "vision_encoder": 0.5},
        "tokens_per_second_per_gpu": 1000.0,
        "images_per_second_per_gpu": 10.0,
        "mfu": 0.4,
        "data_wait_share": 0.01,
        "memory_gb": 3.25,
        "samples": 32.0 * step,
        "cut_samples": 0.0,
        "seconds_per_step": 0.5,
        "eta_seconds": 0.5 * (steps - step),
        "slowest_rank": 1,
        "slowest_ratio": 1.0,
        "slowest_by": "compute",
    }
    return {"event": "train", "step": step, "time": 1.8e9 + step, **line, **more}


def validation(step: int, loss: float) -> dict[str, Any]:
    return {"event": "validation", "step": step, "time": 1.8e9 + step, "loss": loss, "text_loss": 2 * loss}


def write_stage(
    run: Path, number: int, events: list[dict[str, Any]], *, done: bool = True, recipe: str = "tiny"
) -> Path:
    folder = run / f"stage{number}"
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(event)}\n" for event in events))
    (folder / "recipe.yaml").write_text(dump_recipe(load_recipe(recipe)))
    if done:
        (folder / "DONE").touch()
    return folder


def long_run(run: Path) -> Path:
    """Stage 1 of 1000 steps with a spike, broken off once; stage 2 half done with all that can go wrong."""
    steps = 1000
    events = [start(0), *(train(step, steps) for step in range(1, 501)), start(500, ranks=4)]
    events += [
        train(step, steps, grad_norms={"projectors": 77.0 if step == 701 else 1.0}) for step in range(501, steps + 1)
    ]
    events += [validation(500, 3.5), validation(steps, 2.5), {"event": "end", "step": steps}]
    write_stage(run, 1, events)
    half = write_stage(run, 2, troubled(), done=False)
    (half / "metrics.jsonl").open("a").write('{"event": "tra')
    hang = half / "hang"
    hang.mkdir()
    (hang / "verdict.txt").write_text("the others wait for rank 1 on <node2>\n")
    attempt = half / "attempts" / "17.0"
    attempt.mkdir(parents=True)
    for node, code in (("node1", 87), ("node2", 137)):
        (attempt / f"{node}.code").write_text(f"{code}\n")
    return run


def troubled() -> list[dict[str, Any]]:
    lines = [train(step, 100, slowest_ratio=2.0) for step in range(1, 41)]
    lines[20]["loss"] = None
    return [
        start(0),
        *lines,
        {"event": "skipped_step", "step": 21, "sample_ids": [["s7"], ["s8"]], "grad_norms": {}},
        {"event": "bad_samples", "step": 30, "samples": [{"id": "b1", "reason": "truncated <file>"}]},
        {"event": "checkpoint", "step": 40, "time": 1.8e9, "blocked_seconds": 0.1, "failed": "no space left"},
    ]


def write_results(run: Path) -> None:
    """Benchmarks, probes, questions, scores and two maps, one of which is no picture."""
    score = {"name": "accuracy", "value": 61.5, "maximum": 100, "lmms_eval": None}
    benchmarks = {"gqa": {"samples": 400, "scores": [score, {**score, "name": "accuracy.some"}]}}
    _write(run / "eval" / "results.json", {"vision_encoder_sha256": "x", "benchmarks": benchmarks})
    best = {"encoder": "HIVE", "task": "food", "block": 11, "accuracy": 0.8125, "std": 0.015}
    _write(run / "probes" / "food" / "probes.json", {"head": {"name": "linear"}, "best": [best]})
    answers = {"kinds": ["colour", "count"], "truths": ["red", "2"], "answers": ["red", "3"]}
    _write(run / "answers.json", {**answers, "shuffled_answers": ["blue", "2"]})
    _write(run / "scores.json", {"probe shape": 0.625})
    maps = run / "stage1" / "maps" / "step-000500"
    maps.mkdir(parents=True)
    Image.fromarray(np.zeros((1500, 40, 3), np.uint8)).save(maps / "attention_of_layer_4.png")
    (maps / "half.png").write_bytes(b"\x89PNG")


def _write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
