"""Of whom the doctor asks what, and which stages a finding is for."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from hive_ds import kernels
from hive_ds.data.mds import write_mds
from hive_ds.data.schema import caption_sample
from hive_ds.doctor import examine as examining
from hive_ds.doctor import folders, machine, software, trials
from hive_ds.doctor.examine import Patient, examine
from hive_ds.doctor.findings import Diagnosis, Finding
from hive_ds.doctor.folders import STAGES_4_AND_5, check_data, check_models, check_routes, data_folders
from hive_ds.launch.hostfile import Host
from hive_ds.launch.hosts import HostFault
from hive_ds.launch.probe import version
from hive_ds.recipe import load_recipe

WITHOUT_1_TO_3 = [
    f"stages.{name}=null" for name in ("connector_pretraining", "modality_adaptation", "vision_finetuning")
]
WITHOUT_4_AND_5 = [f"stages.{name}=null" for name in STAGES_4_AND_5]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What is asked of the machine and of hosts, none of which is looked at; the host two has a fault."""
    asked: dict[str, Any] = {}

    def check_hosts(hosts: list[Host], **more: Any) -> list[HostFault]:
        asked.update(more)
        return [HostFault("two", "no answer", "start it")]

    monkeypatch.setattr(examining, "check_trials", lambda gpus: asked.update(trials=gpus) or [])
    monkeypatch.setattr(examining, "check_machine", lambda *given: asked.update(machine=given) or [])
    monkeypatch.setattr(examining, "check_hosts", check_hosts)
    monkeypatch.setattr(examining, "count_gpus", lambda: 8)
    return asked


def test_hosts_take_the_place_of_this_machine(
    asked: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DS_ACCELERATOR")
    hosts = [Host("one", 3), Host("two", 3)]
    found = examine(Patient(hosts, load_recipe("tiny"), tmp_path / "run", port=5)).findings
    assert asked == {"trials": 8, "machine": (8, None), "folder": tmp_path, "port": 5, "patience": 40.0}
    said = {one.name: (one.status, one.said, one.advice) for one in found}
    assert said["one"][:2] == ("ok", "answers over ssh, same versions, clock and folder, 3 slots")
    assert said["two"] == ("problem", "no answer", "start it")
    assert "6 ranks" in said["vision_finetuning"][1]  # of the hosts, not the 8 GPUs of this machine
    asked.clear()
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    examine(Patient(port=5))
    assert asked == {"trials": 0, "machine": (2, 5)}


@pytest.mark.parametrize("key", ["text_attention_backend", "vision_attention"])
def test_flash_attention_is_needed_where_the_recipe_names_it(key: str) -> None:
    assert examining._needs_flash(load_recipe("tiny", [f"model.{key}=flash_attention_2"]))
    assert not examining._needs_flash(load_recipe("tiny"))


def test_data_of_a_stage_is_looked_at_beside_the_data_that_is_named(asked: dict[str, Any], tmp_path: Path) -> None:
    """A stage is to be left out only where nothing else reads what it lacks."""
    own = ["stages.vision_finetuning.data={train: both}", "stages.vlm_alignment.data={train: both}"]
    own += ["stages.vlm_instruction_tuning.data={train: last}", "data.validation=null", "data.text_validation=null"]
    found = {one.name: one for one in examine(Patient(recipe=load_recipe("tiny", own), data=str(tmp_path))).findings}
    assert found["--data"].status == "problem"
    assert "data.train" not in found
    both, last = (found[f"stages.{name}.data.train"] for name in ("vision_finetuning", "vlm_instruction_tuning"))
    assert both.stages == ("vision_finetuning", "vlm_alignment")
    assert ("leave that stage out" in both.advice, "leave that stage out" in last.advice) == (False, True)


def test_folders_are_called_by_the_key_that_names_them() -> None:
    own = ["data.train={a: 1, b: 2}", "data.validation=c", "data.text_validation=null"]
    recipe = load_recipe("tiny", [*own, *WITHOUT_4_AND_5, "stages.connector_pretraining.data={train: d}"])
    found = {folder: (one.key, len(one.stages)) for folder, one in data_folders(recipe).items()}
    assert found == {
        "a": ("data.train", 2),
        "b": ("data.train", 2),
        "c": ("data.validation", 3),
        "d": ("stages.connector_pretraining.data.train", 1),
    }


def test_models_are_those_of_the_stages_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "_cached", lambda name: name == "in/cache")
    models = [f"model.language_model={tmp_path}", "model.vision_encoder=./gone"]
    models += ["vlm.language_model=in/cache", "vlm.vision_encoder=./gone-too"]

    def found(*more: str) -> dict[str, tuple[str, tuple[str, ...]]]:
        return {one.name: (one.status, one.stages) for one in check_models(load_recipe("tiny", [*models, *more]))}

    first = {"model.vision_encoder": ("problem", ()), "model.language_model": ("ok", ())}
    last = {"vlm.language_model": ("ok", ()), "vlm.vision_encoder": ("problem", STAGES_4_AND_5)}
    assert found() == first | last
    assert found(*WITHOUT_1_TO_3) == last
    assert found(*WITHOUT_4_AND_5) == first
    paper = "hive-siglip-l-mobilellm-600m"  # both of known depth
    assert [one.name for one in check_routes(load_recipe(paper))] == ["model.routes"]
    alone = [*WITHOUT_1_TO_3, "vlm.vision_encoder=in/cache"]
    assert list(check_routes(load_recipe(paper, alone))) == []


@pytest.mark.parametrize("broken", [0, 2, 4])
def test_samples_are_tried_at_both_ends_and_in_the_middle(broken: int, picture: bytes, tmp_path: Path) -> None:
    images = [b"no picture" if number == broken else picture for number in range(5)]
    write_mds((caption_sample(f"s{number}", image, "text") for number, image in enumerate(images)), tmp_path / "data")
    assert check_data(str(tmp_path / "data"), "data.train").status == "problem"


def test_a_folder_without_samples(tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text(json.dumps({"version": 2, "shards": []}))
    found = check_data(str(tmp_path), "data.train")
    assert (found.status, found.said) == ("problem", f"data folder {tmp_path}: lists no samples")


def test_the_way_out_is_to_leave_out_what_lacks_and_what_starts_from_it() -> None:
    stages = ("vision_finetuning", *STAGES_4_AND_5)

    def summary(*problems: tuple[str, ...]) -> str:
        found = [Finding("data", "a", "problem", "gone", "fetch it", names) for names in problems]
        return Diagnosis(found, 1.0, stages).summary().partition(";")[0].partition(":")[0]

    assert summary(STAGES_4_AND_5[:1]) == "stages 4 and 5 cannot start"
    assert summary(STAGES_4_AND_5[1:]) == "stage 5 cannot start"
    assert summary(STAGES_4_AND_5[1:], ()) == "not fit to train yet"  # another problem is of all stages
    assert summary(stages[:2]) == "not fit to train yet"


@pytest.mark.parametrize(
    ("visible", "count"),
    [(None, 4), ("", 0), ("-1", 0), ("0,1", 2), (" 3, 1", 2), ("0,-1,2", 1), ("0,1,2,3,4,5", 4), ("GPU-8a1b", 1)],
)
def test_gpus_are_those_that_cuda_shows(visible: str | None, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.glob, "glob", lambda pattern: [f"/dev/nvidia{number}" for number in range(4)])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert machine.count_gpus() == count


def test_every_rank_needs_a_core_and_its_part_of_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {4, 5})
    assert [machine._processor(ranks).status for ranks in (2, 3)] == ["ok", "warning"]
    assert [machine.shared_memory(400_000_000, ranks).status for ranks in (1, 2)] == ["ok", "problem"]


def test_a_kernel_that_computes_something_else_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    def spoilt(*given: Any, backend: str) -> Any:
        return attend(*given, backend="reference") + 0.02 * (backend == "triton")

    attend = kernels.hierarchical_attention
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(kernels, "hierarchical_attention", spoilt)
    with pytest.raises(RuntimeError, match=r"the kernel is off the reference by 0\.02"):
        trials._attend("cpu")


def test_the_clock_of_this_disk_is_this_machines(tmp_path: Path) -> None:
    found = {one.name: one.status for one in machine.check_disk(tmp_path)}
    assert found["clock of its server"] == "ok"


def test_requirements_are_those_of_this_python_and_of_one_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["a>=1", 'b; extra == "more"', 'c; python_version > "3"', 'a; extra == "more"', 'd; python_version < "3"']
    monkeypatch.setattr(software, "requires", lambda package: lines)
    assert [one.name for one in software.required("it", "")] == ["a", "c"]
    assert [one.name for one in software.required("it", "more")] == ["b"]


def test_a_nightly_build_of_torch_is_a_later_one() -> None:
    found = software.check_software(lambda name: "2.99.0.dev20261101+cu130" if name == "torch" else version(name))
    assert [(one.status, one.said) for one in found if one.name == "torch"] == [("ok", "2.99.0.dev20261101+cu130")]
