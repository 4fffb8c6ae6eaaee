"""Every check of the doctor on something sound, and on the fault it is there for."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from transformers import Dinov2Config, LlamaConfig

from hive_ds.cli import main
from hive_ds.data.mds import write_mds
from hive_ds.data.schema import caption_sample
from hive_ds.doctor import machine, trials
from hive_ds.doctor.examine import Patient, check_batches, examine
from hive_ds.doctor.findings import Diagnosis, Finding
from hive_ds.doctor.folders import check_data, check_models, check_routes, check_run, data_folders
from hive_ds.doctor.software import check_software
from hive_ds.doctor.trials import check_trials
from hive_ds.launch.probe import version
from hive_ds.recipe import load_recipe
from hive_ds.training.checkpoint_files import describe_file, publish

MINUTE = 60
AREAS = ["versions", "machine", "disk", "trials"]


def by_name(findings: Iterable[Finding]) -> dict[str, Finding]:
    return {one.name: one for one in findings}


@pytest.fixture
def shards(tmp_path: Path, picture: bytes) -> Path:
    folder = tmp_path / "shards"
    write_mds((caption_sample(f"s{number}", picture, "a square") for number in range(5)), folder)
    return folder


def test_this_machine_is_fit_within_a_minute(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    port = free_port()
    code = main(["doctor", "--json", "--run", str(tmp_path), "--port", str(port)])
    said = json.loads(capsys.readouterr().out)
    problems = [one for one in said["findings"] if one["status"] == "problem"]
    assert (code, problems) == (0, [])
    assert said["seconds"] < MINUTE
    assert list(dict.fromkeys(one["area"] for one in said["findings"])) == [*AREAS[:3], "run", "trials"]
    found = {one["name"]: one["said"] for one in said["findings"]}
    assert found["torch"] == version("torch")
    assert found["port"] == f"{port} is free"
    assert found["all-reduce"].startswith("2 ranks over gloo, ")
    assert "equal to the reference" in found["Triton kernel"]
    assert sum(said["counts"].values()) == len(said["findings"])


def test_what_does_not_work_is_found_by_trying(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A network that is not there, and a Triton that does not import."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nowhere0")
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text("raise ImportError('planted')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = by_name(check_trials(0))
    assert (found["all-reduce"].status, found["Triton kernel"].status) == ("problem", "warning")
    assert "nowhere0" in found["all-reduce"].said
    assert "GLOO_SOCKET_IFNAME" in found["all-reduce"].advice
    assert found["Triton kernel"].said == "ImportError: planted"
    assert "attention_backend=sdpa" in found["Triton kernel"].advice


def test_gpus_that_torch_does_not_see(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seen = torch.cuda.device_count()
    trials.main(tmp_path, 0, 1, seen + 1)
    said = {line["trial"]: line.get("error") for line in map(json.loads, capsys.readouterr().out.splitlines())}
    assert said["all-reduce"] == f"RuntimeError: torch sees {seen} of {seen + 1} GPUs"
    assert said["GPUs"] == f"RuntimeError: {seen} GPUs work of {seen + 1}"


def test_a_trial_that_hangs_is_ended() -> None:
    found = by_name(check_trials(0, patience=0.01))
    assert found["all-reduce"].status == "problem"
    assert found["all-reduce"].said.startswith("no answer within 0 s, or a crash: ")


def test_a_trial_has_failed_where_one_rank_says_so(tmp_path: Path) -> None:
    """Whichever rank is read first; a rank that crashed may have said anything at all."""
    good, bad = ({"trial": "all-reduce", **said} for said in ({"said": "2 ranks"}, {"error": "no network"}))
    for said in ((good, bad), (bad, good)):
        for rank, line in enumerate(said):
            (tmp_path / f"out-{rank}").write_bytes(b"loading \xff\n" + json.dumps(line).encode() + b"\n")
        (tmp_path / "err-0").write_bytes(b"a trace\nillegal \xff instruction\n")
        (tmp_path / "err-1").write_text("")
        on_cpu, on_gpus = (by_name(trials._read(tmp_path, with_gpus, 5)) for with_gpus in (False, True))
        assert (on_cpu["all-reduce"].status, on_cpu["all-reduce"].said) == ("problem", "no network")
        assert on_cpu["Triton kernel"].said == "no answer within 5 s, or a crash: illegal \ufffd instruction"
        assert (on_cpu["Triton kernel"].status, on_gpus["Triton kernel"].status) == ("warning", "problem")
        assert (list(on_cpu), list(on_gpus)) == (
            ["all-reduce", "Triton kernel"],
            ["all-reduce", "GPUs", "Triton kernel"],
        )


def test_versions_out_of_range() -> None:
    planted = {
        "torch": "2.8.1",
        "transformers": None,
        "deepspeed": "0.19.2",
        "mosaicml-streaming": None,
        "triton": "0.1",
    }
    found = by_name(check_software(lambda name: planted.get(name, version(name) if name not in planted else None)))
    bad = {name: (one.said, one.advice) for name, one in found.items() if one.status != "ok"}
    assert set(bad) == set(planted)
    assert bad["torch"] == ("2.8.1; expected >=2.9", 'pip install "torch>=2.9"')
    assert bad["transformers"][0].startswith("not installed; expected ")
    assert bad["deepspeed"][1] == 'pip install "deepspeed>=0.19.8"'
    assert "[streaming]" in bad["mosaicml-streaming"][1]
    assert found["flash-attn"].status == "ok"
    needed = by_name(check_software(lambda name: None if name == "flash-attn" else version(name), flash_needed=True))
    assert needed["flash-attn"].status == "problem"


def test_tools_and_port(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with socket.socket() as busy:
        busy.bind(("", 0))
        busy.listen()
        port = busy.getsockname()[1]
        found = by_name(machine.check_machine(10**6, port))
    assert {name for name, one in found.items() if one.status == "problem"} == {"g++", "ninja", "/dev/shm", "port"}
    assert found["cores"].status == "warning"
    assert "apt-get install g++" in found["g++"].advice
    assert found["port"].said == f"{port} is in use"
    assert "--master_port" in found["port"].advice


def test_figures_at_their_limits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert machine.shared_memory(500_000_000, 2).status == "ok"
    small = machine.shared_memory(64_000_000, 2)
    assert (small.status, small.said) == ("problem", "0.06 GB free; 2 ranks need 0.50 GB")
    assert "--shm-size" in small.advice
    assert machine.shared_memory(None, 2).status == "problem"
    assert machine.file_clock(4.9).status == "ok"
    assert machine.file_clock(-0.01).said == "0.0 s off this machine's"
    assert machine.file_clock(-60).said == "-60 s off this machine's"
    (blocked,) = machine.check_disk(tmp_path / "missing")
    assert (blocked.status, blocked.said) == (
        "problem",
        f"cannot write to {tmp_path / 'missing'}: No such file or directory",
    )
    monkeypatch.setattr(machine, "DISK", 10**18)
    assert by_name(machine.check_disk(tmp_path))[str(tmp_path)].status == "warning"
    monkeypatch.setattr(machine, "count_gpus", lambda: 8)
    monkeypatch.setattr(machine, "DRIVER", tmp_path / "version")
    found = by_name(machine.check_machine(8, None))
    assert "port" not in found  # of another host
    assert found["driver"].said == "8 devices, but no driver is loaded"


def test_data_folders(shards: Path, tmp_path: Path) -> None:
    sound = check_data(str(shards), "data.train")
    assert (sound.status, sound.said) == ("ok", f"{shards}: 5 samples in 1 shards")
    assert check_data("s3://bucket/data", "data.train").status == "warning"
    missing = check_data(str(tmp_path / "missing"), "data.train")
    assert (missing.status, "data convert" in missing.advice) == ("problem", True)
    (shard,) = shards.glob("*.mds")
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    cut = check_data(str(shards), "data.train")
    assert (cut.status, "not as long as the index says" in cut.said) == ("problem", True)
    assert f"hive-ds data verify {shards}" in cut.advice
    shard.write_bytes(whole.replace(b"\x89PNG", b"\x00PNG"))
    assert check_data(str(shards), "data.train").status == "problem"
    shard.unlink()
    assert check_data(str(shards), "data.train").status == "problem"


def test_recipe(tmp_path: Path, shards: Path) -> None:
    overrides = [f"data.train={{{shards}: 1, s3://a: 2}}", "data.validation=null", f"data.text_validation={shards}"]
    recipe = load_recipe("tiny", [*overrides, f"model.language_model={tmp_path}", "model.vision_encoder=no/such"])
    assert {folder: one.key for folder, one in data_folders(recipe).items()} == {
        str(shards): "data.train",
        "s3://a": "data.train",
    }
    models = by_name(check_models(recipe))
    assert (models["model.language_model"].status, models["model.vision_encoder"].status) == ("ok", "warning")
    assert "hf download no/such" in models["model.vision_encoder"].advice
    assert {one.status for one in check_batches(recipe, 2)} == {"ok"}
    auto = load_recipe("tiny", ["stages.vision_finetuning.micro_batch_size=auto"])
    assert by_name(check_batches(auto, 2))["vision_finetuning"].said.endswith("on 2 ranks, micro-batch auto")
    odd = list(check_batches(recipe, 7))
    assert {one.status for one in odd} == {"problem"}
    assert all(f"stages.{one.name}.global_batch_size" in one.advice for one in odd)


WITHOUT_DATA = ("data.validation=null", "data.text_validation=null")


def test_routes_that_training_would_refuse(tmp_path: Path) -> None:
    """As of a recipe on a base recipe's routes, with an encoder and an LLM of its own."""
    Dinov2Config(num_hidden_layers=12).save_pretrained(tmp_path / "encoder")
    LlamaConfig(num_hidden_layers=4).save_pretrained(tmp_path / "llm")
    models = [f"model.vision_encoder={tmp_path / 'encoder'}", f"model.language_model={tmp_path / 'llm'}"]
    (found,) = check_routes(load_recipe("hive-clip-l-smollm2-360m", models))
    assert found.status == "problem"
    assert "vision blocks 14, 17, 20, 23 are out of range; the encoder's are 1 to 12" in found.said
    assert "routes: {vision_blocks: [2, 5, 8, 11], language_layers: [0, 1, 2, 3]}" in found.said
    (fits,) = check_routes(load_recipe("tiny", models))
    assert (fits.status, "note: the routes end at vision block 3 of 12" in fits.said) == ("ok", True)
    (tmp_path / "encoder" / "config.json").write_text("{")
    (broken,) = check_routes(load_recipe("tiny", models))
    assert (broken.status, broken.name) == ("problem", "model")
    assert f"vision encoder '{tmp_path}/encoder' has no readable config.json" in broken.said
    (known,) = check_routes(load_recipe("hive-clip-l-smollm2-360m"))
    assert (known.status, known.said) == ("ok", "8 routes from 24 vision blocks to 32 language layers")


def test_stages_4_and_5_that_lack_something_are_named_with_a_way_out(
    monkeypatch: pytest.MonkeyPatch, shards: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr("hive_ds.doctor.examine.check_trials", lambda _gpus: [])
    own = [f"stages.{one}.data={{train: {tmp_path}/{one}}}" for one in ("vlm_alignment", "vlm_instruction_tuning")]
    models = [f"{key}={tmp_path}" for key in ("model.vision_encoder", "model.language_model", "vlm.language_model")]
    options = [f"data.train={shards}", *WITHOUT_DATA, *models, "model.kind=cascaded", "model.routes=null", *own]

    def diagnose(*more: str) -> Diagnosis:
        return examine(Patient(recipe=load_recipe("tiny", [*options, *more]), port=free_port()))

    lacking = diagnose()
    assert [one.name for one in lacking.findings if one.status == "problem"] == [
        "stages.vlm_alignment.data.train",
        "stages.vlm_instruction_tuning.data.train",
    ]
    (advice,) = {one.advice for one in lacking.findings if one.name == "stages.vlm_alignment.data.train"}
    assert advice.endswith("; or leave that stage out with --set stages.vlm_alignment=null")
    left_out = "--set stages.vlm_alignment=null --set stages.vlm_instruction_tuning=null"
    said = f"stages 4 and 5 cannot start; leave them out with {left_out}, all else is fit to train: 2 problems"
    assert (lacking.exit_code, lacking.summary().startswith(said)) == (1, True)
    assert diagnose(*left_out.replace("--set ", "").split()).exit_code == 0
    last = diagnose(f"stages.vlm_alignment.data.train={shards}").summary()
    assert last.startswith("stage 5 cannot start; leave it out with --set stages.vlm_instruction_tuning=null, ")
    assert diagnose("stages.vision_finetuning.data.train=a").summary().startswith("not fit to train yet: 3 problems")


def test_what_make_quickstart_makes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe("tiny")
    missing = [*check_models(recipe), check_data(recipe.data.train, "data.train")]
    assert {(one.status, one.advice) for one in missing} == {("problem", "`make quickstart` makes it")}


def test_folder_of_a_run(tmp_path: Path) -> None:
    assert [one.said for one in check_run(tmp_path)] == ["no stage yet"]
    done, stage = tmp_path / "stage1", tmp_path / "stage2"
    done.mkdir()
    (done / "DONE").touch()
    for step in (10, 20):
        write_checkpoint(stage / "checkpoints" / f"step-{step:06d}")
    first, second = check_run(tmp_path)
    assert (first.said, second.status) == ("done", "ok")
    assert second.said.startswith("a resume takes step-000020 ")
    (stage / "checkpoints" / "step-000020" / "state.json").write_text("{")
    (stage / "STOP").touch()
    _, stop, damaged, resumed = check_run(tmp_path)
    assert (stop.status, f"rm {stage / 'STOP'}" in stop.advice) == ("warning", True)
    assert damaged.said == "not whole: step-000020: state.json has 1 bytes, expected 2"
    assert f"hive-ds checkpoint verify {stage}" in damaged.advice
    assert resumed.said.startswith("a resume takes step-000010 ")
    (stage / "checkpoints" / "step-000010" / "manifest.json").unlink()
    assert [one.status for one in check_run(tmp_path)][-1] == "problem"


def test_report_says_what_to_do() -> None:
    findings = [Finding("a", "x", "ok", "fine"), Finding("a", "y", "warning", "odd", "mend y")]
    assert Diagnosis(findings, 1.0).exit_code == 0
    bad = Diagnosis([*findings, Finding("b", "z", "problem", "gone", "fetch z")], 2.0)
    assert bad.exit_code == 1
    lines = str(bad).splitlines()
    assert lines[-3:] == ["  problem  z: gone", "           do: fetch z", bad.summary()]
    assert bad.summary() == "not fit to train yet: 1 problem, 1 warning, 1 ok, 2 s"
    with pytest.raises(AssertionError, match="says nothing of what to do"):
        Finding("a", "x", "problem", "gone")


@pytest.mark.parametrize("wrong", [["--hostfile", "none"], ["--recipe", "tinny"], ["--set", "a=1"]])
def test_wrong_input(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", *wrong]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_examination_asks_for_what_the_patient_names(
    monkeypatch: pytest.MonkeyPatch, shards: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr("hive_ds.doctor.examine.check_trials", lambda _gpus: [])
    recipe = load_recipe("tiny", ["data.train=elsewhere", "data.validation=null", "data.text_validation=null"])
    found = examine(Patient(recipe=recipe, data=str(shards), run=tmp_path / "new", port=free_port())).findings
    data = [one for one in found if one.area == "data"]
    assert [(one.name, one.status) for one in data] == [("--data", "ok")]  # in the place of data.train
    assert next(one.name for one in found if one.area == "disk") == str(tmp_path)  # where the folder will be made
    assert not [one for one in found if one.area == "run"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def write_checkpoint(folder: Path) -> None:
    aside = folder.with_name(f".{folder.name}")
    aside.mkdir(parents=True)
    (aside / "state.json").write_text("{}")
    publish(aside, folder, {"state.json": describe_file(aside / "state.json")})
