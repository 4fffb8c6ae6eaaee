"""Benchmarks from end to end on tiny local copies: no network, one rank and two, batched or not, and planted faults."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from benchmark_data import picture, write_benchmarks
from scene_models import save_cascaded_scene_model, save_scene_model

pytest.importorskip("lmms_eval", reason="lmms-eval is not installed; make venv installs it")

from hive_ds.cli import main
from hive_ds.errors import HiveError
from hive_ds.evaluation.benchmarks import checkpoint_model, runner
from hive_ds.evaluation.benchmarks.catalogue import BENCHMARKS
from hive_ds.evaluation.benchmarks.golden import check_golden
from hive_ds.evaluation.benchmarks.local_data import local_task
from hive_ds.evaluation.benchmarks.run import Request, evaluate
from hive_ds.evaluation.benchmarks.runner import load_tasks, run_model
from hive_ds.evaluation.benchmarks.self_test import run_self_tests
from hive_ds.evaluation.benchmarks.stand_ins import StandIn
from hive_ds.evaluation.checkpoints import load_checkpoint
from hive_ds.export.encoder import export_encoder
from hive_ds.model.identity import folder_sha256, model_sha256

ALL = ",".join(BENCHMARKS)
QUESTIONS = {"mme": 30, "gqa": 4, "ok_vqa": 4, "scienceqa": 5, "scienceqa_img": 3, "textvqa_val": 4, "pope": 6}
NO_NETWORK = """
import socket
connect = socket.socket.connect
def refuse(self, address):
    if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost", socket.gethostname()):
        raise OSError(f"a test opened a connection to {address}")
    return connect(self, address)
socket.socket.connect = refuse
"""


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("a test opened a socket")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LMMS_EVAL_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield write_benchmarks(tmp_path_factory.mktemp("benchmarks"))


@pytest.fixture(scope="module")
def tasks(data: Path) -> dict[str, Any]:
    return load_tasks(list(BENCHMARKS.values()), {name: local_task(BENCHMARKS[name], data) for name in BENCHMARKS})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_scene_model(folder)
    return folder


@pytest.fixture(scope="module")
def one_rank(data: Path, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("results")
    command = ["eval", str(checkpoint), "--tasks", ALL, "--data", str(data), "--out", str(out), "--batch-size", "4"]
    assert main([*command, "--device", "cpu"]) == 0
    return out


def read(out: Path) -> dict[str, Any]:
    return json.loads((out / "results.json").read_text())


def replies(out: Path, name: str) -> list[str]:
    return [json.loads(line)["reply"] for line in (out / "answers" / f"{name}.jsonl").read_text().splitlines()]


def test_every_benchmark_runs_offline_and_says_what_was_measured(one_rank: Path, checkpoint: Path) -> None:
    results = read(one_rank)
    model, _ = load_checkpoint(checkpoint)
    assert results["weights_sha256"] == model_sha256(model)
    assert results["vision_encoder_sha256"] == folder_sha256(checkpoint)
    assert {"lmms-eval", "transformers", "torch", "hive-ds"} <= set(results["versions"])
    assert len(results["self_tests"]) == 3 * (2 + 5 + 5)  # MME's two, POPE's five, one of each other benchmark
    assert set(results["benchmarks"]) == set(BENCHMARKS)
    for name, found in results["benchmarks"].items():
        assert found["samples"] == found["available"] == QUESTIONS[name] == len(replies(one_rank, name))
        assert found["prompt_version"] == found["task_config"]["metadata"]["version"]
        assert found["split"] in found["task_config"]["dataset_kwargs"]["data_files"]
        assert sum(file["rows"] for file in found["data"]) >= found["samples"]
    scores = {score["name"]: score for score in results["benchmarks"]["mme"]["scores"]}
    assert (scores["perception"]["maximum"], scores["cognition"]["maximum"]) == (2000, 800)
    assert len({reply for name in BENCHMARKS for reply in replies(one_rank, name)}) > 10  # a random model, no constant
    summary = json.loads((one_rank / "scores.json").read_text())
    assert summary["weights_sha256"] == results["weights_sha256"]
    assert next(iter(summary["scores"])) == "mme-1 (mme, test, 30 questions)"
    table = (one_rank / "scores.md").read_text()
    assert all(f"| {name} " in table for name in BENCHMARKS)


def test_one_by_one_answers_as_in_batches(one_rank: Path, data: Path, checkpoint: Path) -> None:
    """ScienceQA's batches hold questions with and without an image; GQA's images lie apart from the questions."""
    chosen = ("scienceqa", "gqa")
    outcomes = evaluate(Request(chosen, data, checkpoint, batch_size=1, device="cpu", self_test=False))
    assert [outcome.benchmark.name for outcome in outcomes] == list(chosen)
    for outcome in outcomes:
        assert [row.answer for row in outcome.rows] == replies(one_rank, outcome.benchmark.name)


def test_a_cascaded_model_answers_and_another_encoder_is_refused(data: Path, tmp_path: Path) -> None:
    save_cascaded_scene_model(tmp_path / "cascaded")
    save_scene_model(tmp_path / "hive")
    export_encoder(tmp_path / "cascaded", tmp_path / "encoder")
    export_encoder(tmp_path / "hive", tmp_path / "other")
    request = Request(["scienceqa"], data, tmp_path / "cascaded", device="cpu", self_test=False)
    request = replace(request, encoder=tmp_path / "encoder", out=tmp_path / "out", batch_size=5)
    (together,) = evaluate(request)
    (alone,) = evaluate(replace(request, batch_size=1, out=None))
    assert [row.answer for row in together.rows] == [row.answer for row in alone.rows]
    assert len({row.answer for row in together.rows}) > 1
    assert read(tmp_path / "out")["model_class"] == "CascadedForCausalLM"
    assert read(tmp_path / "out")["vision_encoder_sha256"] == folder_sha256(tmp_path / "encoder")
    with pytest.raises(HiveError, match="vision encoder has SHA-256"):
        evaluate(replace(request, encoder=tmp_path / "other"))


def test_results_are_not_lost(one_rank: Path, data: Path, checkpoint: Path, tmp_path: Path) -> None:
    """Neither new ones, for a folder that cannot be written to, nor those of other benchmarks before them."""
    file = tmp_path / "file"
    file.touch()
    request = Request(["scienceqa"], data, checkpoint, out=file, device="cpu", self_test=False)
    with pytest.raises(HiveError, match=f"{file}: cannot be written .*; expected a folder for results"):
        evaluate(request)
    with pytest.raises(HiveError, match=f"--out {one_rank}: holds scores of gqa, mme.* would drop"):
        evaluate(replace(request, out=one_rank))
    (tmp_path / "results.json").write_text("[1]")
    with pytest.raises(HiveError, match=r"results\.json: TypeError: .*; expected results of an earlier evaluation"):
        evaluate(replace(request, out=tmp_path))


def test_two_ranks_answer_and_score_as_one(one_rank: Path, data: Path, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(NO_NETWORK)
    some = ("gqa", "ok_vqa", "scienceqa", "pope")  # images apart, averages, an odd number, ratios by category
    command = ["eval", checkpoint, "--tasks", ",".join(some), "--data", data, "--out", tmp_path / "out"]
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--no-python"]
    program = Path(sys.executable).with_name("hive-ds")
    done = subprocess.run(
        [sys.executable, *launcher, program, *command, "--batch-size", "3", "--no-self-test", "--device", "cpu"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    alone, together = read(one_rank), read(tmp_path / "out")
    assert (alone["ranks"], together["ranks"]) == (1, 2)
    for name in some:
        assert replies(tmp_path / "out", name) == replies(one_rank, name)
        one, two = alone["benchmarks"][name], together["benchmarks"][name]
        assert one["scores"] == two["scores"]
        assert one["lmms_eval"] == pytest.approx(two["lmms_eval"], rel=1e-12)


@pytest.mark.parametrize(
    ("kind", "perception", "cognition", "pope"),
    [
        ("oracle", 2000, 800, {"accuracy": 1, "precision": 1, "recall": 1, "f1": 1, "yes_ratio": 0.5}),
        ("constant", 500, 200, {"accuracy": 0.5, "precision": 0.5, "recall": 1, "f1": 2 / 3, "yes_ratio": 1}),
        ("wrong", 0, 0, {"accuracy": 0, "precision": 0, "recall": 0, "f1": 0, "yes_ratio": 0.5}),
    ],
)
def test_stand_ins_score_what_is_known(
    kind: str, perception: float, cognition: float, pope: dict[str, float], tasks: dict[str, Any]
) -> None:
    outcomes = {one.benchmark.name: one for one in run_model(StandIn(kind, "cpu"), [*BENCHMARKS.values()], tasks, None)}
    values = {name: {score.name: score.value for score in one.scores} for name, one in outcomes.items()}
    assert (values["mme"]["perception"], values["mme"]["cognition"]) == (perception, cognition)
    assert {name: value for name, value in values["pope"].items() if "." not in name} == pytest.approx(pope)
    most = (1 + 0.6 + 0.6 + 1) / 4  # ten alike; at best two of ten, twice; four of ten once normalised
    vqa = {"oracle": most, "constant": 0.6 / 4, "wrong": 0}[kind]
    assert values["ok_vqa"]["accuracy"] == values["textvqa_val"]["accuracy"] == pytest.approx(vqa)
    assert values["gqa"]["accuracy"] == {"oracle": 1, "constant": 0.25, "wrong": 0}[kind]
    assert values["scienceqa"]["accuracy"] == values["scienceqa_img"]["accuracy"] == (kind == "oracle")


def test_self_tests_stop_at_a_scorer_that_is_off(tasks: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks["scienceqa"].config, "process_results", lambda doc, results: {"exact_match": 1.0})
    with pytest.raises(HiveError, match=r"self-test of scienceqa: model constant scores accuracy 1.0"):
        run_self_tests([BENCHMARKS["scienceqa"]], tasks, limit=None, device="cpu")


def test_a_changed_prompt_or_scorer_is_an_error(tasks: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, task in tasks.items():
        check_golden(BENCHMARKS[name], task)
        settings = task.lmms_eval_specific_kwargs
        with monkeypatch.context() as patch:
            patch.setitem(settings, "post_prompt", settings["post_prompt"].rstrip("."))
            with pytest.raises(HiveError, match=f"{name}: the prompt is"):
                check_golden(BENCHMARKS[name], task)
    with monkeypatch.context() as patch:
        patch.setattr(tasks["pope"].config, "process_results", lambda doc, results: {"pope_accuracy": {"score": 1.0}})
        with pytest.raises(HiveError, match=r"pope: the answer 'Yes.' scores 1.0 and not 0.0"):
            check_golden(BENCHMARKS["pope"], tasks["pope"])
    monkeypatch.setattr(tasks["mme"], "VERSION", "mme-2")
    with pytest.raises(HiveError, match="mme-2 has no golden file"):
        check_golden(BENCHMARKS["mme"], tasks["mme"])


def test_a_failing_model_raises_and_writes_nothing(
    data: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not an empty answer that scores 0."""
    answer = checkpoint_model.generate_answers

    def fail_on_the_second_batch(model, processor, prompts, images, **settings):
        if any("that" in prompt for prompt in prompts):
            raise ValueError("out of luck")
        return answer(model, processor, prompts, images, **settings)

    monkeypatch.setattr(checkpoint_model, "generate_answers", fail_on_the_second_batch)
    request = Request(["gqa"], data, checkpoint, tmp_path / "out", batch_size=1, device="cpu", self_test=False)
    with pytest.raises(RuntimeError, match="no answers to documents hive_gqa 1: out of luck"):
        evaluate(request)
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    monkeypatch.undo()
    monkeypatch.setattr(runner, "labels", lambda *_: [{}] * 5)
    with pytest.raises(RuntimeError, match="4 answers came back for 5 questions"):
        evaluate(request)


def test_missing_data_is_named_before_anything_runs(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    def fails(message: str, tasks: str = "mme", folder: Path = data, *more: str) -> None:
        command = ["eval", "--self-test", "--tasks", tasks, "--data", str(folder), "--device", "cpu", *more]
        assert main(command) == 2
        assert message in capsys.readouterr().err

    fails("benchmark mmee: expected some of mme, gqa", "mmee")
    fails(f"gqa: no folder {tmp_path}/GQA/testdev_balanced_instructions", "gqa", tmp_path)
    (tmp_path / "MME/data").mkdir(parents=True)
    fails(f"mme: no file test-*.parquet in {tmp_path}/MME/data", folder=tmp_path)
    broken = tmp_path / "MME/data/test-00000-of-00001.parquet"
    broken.write_bytes(b"PAR1")
    fails(f"mme: {broken} is no parquet file", folder=tmp_path)
    from datasets import Dataset

    row = {"question_id": "1", "question": "Is it?", "answer": "Yes"}
    Dataset.from_list([row]).to_parquet(broken)
    fails("lacks the columns image, category; it has question_id, question, answer", folder=tmp_path)
    Dataset.from_list([{**row, "category": "count", "image": "a.png"}]).to_parquet(broken)
    fails("is of type string; expected the hub's struct of bytes and path", folder=tmp_path)
    Dataset.from_list([{**row, "category": "count", "image": picture(0)}]).to_parquet(broken)
    fails("mme: image 1 (count) has 1 of its 2 questions among the first 1 rows", folder=tmp_path)
    fails("has 1 of its 2 questions among the first 3 rows", "mme", data, "--limit", "3")
    fails("--limit 0: expected a number of at least 1", "mme", data, "--limit", "0")
    assert main(["eval", "--tasks", "mme", "--data", str(data)]) == 2
    assert "no CHECKPOINT" in capsys.readouterr().err


def test_limit_asks_the_first_questions_only(data: Path, capsys: pytest.CaptureFixture) -> None:
    command = ["eval", "--self-test", "--tasks", "mme,pope", "--data", str(data), "--limit", "4", "--device", "cpu"]
    assert main(command) == 0
    assert "self-tests: 18 scores" in capsys.readouterr().out  # no question of cognition among the first four


def test_tasks_that_sample_are_refused() -> None:
    read = checkpoint_model.GenerationSettings.read
    settings = read({"max_new_tokens": 5, "until": ["\n\n"], "temperature": 0.0, "do_sample": False}, "t")
    assert settings.cut(" a\nb\n\nc") == "a\nb"
    assert replace(settings, stops=()).cut("a\n\nc") == "a\n\nc"
    assert read({"max_new_tokens": 5, "until": "\n\n", "num_beams": 3}, "t") == replace(settings, num_beams=3)
    with pytest.raises(HiveError, match="task t: samples answers"):
        read({"max_new_tokens": 5, "temperature": 0.7}, "t")
    with pytest.raises(HiveError, match="task t: sets no max_new_tokens"):
        read({"until": ["x"]}, "t")
