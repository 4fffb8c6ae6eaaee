from __future__ import annotations

import importlib.metadata
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from dockerfile_parse import DockerfileParser
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]


def python(code: str, folder: Path, path: Path | None = None) -> str:
    """What ``python -c code`` prints when started in ``folder``, with ``path`` on PYTHONPATH."""
    environment = {**os.environ, "PYTHONPATH": str(path) if path else ""}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy: a build writes into its source tree."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("hive_ds", "kernels", "ds_configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "absent from" not in done.stdout + done.stderr  # a folder of data that setuptools will leave out one day
    return next(out.glob("hive_ds-*.whl"))


@pytest.fixture(scope="module")
def distribution(wheel: Path) -> Iterator[importlib.metadata.Distribution]:
    """What the wheel says of itself."""
    with zipfile.ZipFile(wheel) as archive:
        folder = next(name.partition("/")[0] for name in archive.namelist() if ".dist-info/" in name)
        yield importlib.metadata.PathDistribution(zipfile.Path(archive, f"{folder}/"))  # type: ignore[arg-type]


def test_wheel_holds_every_module_recipe_and_zero_policy(wheel: Path):
    expected = {str(path.relative_to(ROOT)) for path in (ROOT / "hive_ds").rglob("*.py")}
    expected |= {str(path.relative_to(ROOT)) for path in (ROOT / "hive_ds/recipes").glob("*.yaml")}
    expected |= {str(path.relative_to(ROOT)) for path in (ROOT / "hive_ds/benchmarks").glob("*.json")}
    expected |= {f"hive_ds/ds_configs/{path.name}" for path in (ROOT / "ds_configs").glob("*.json")}
    benchmarks = ROOT / "hive_ds/evaluation/benchmarks"
    expected |= {str(path.relative_to(ROOT)) for path in (*benchmarks.glob("*/*.yaml"), *benchmarks.glob("*/*.json"))}
    kernels = ROOT / "kernels" / "hive_kernels"
    expected |= {f"hive_ds/kernels/{path.relative_to(kernels)}" for path in kernels.rglob("*.py")}
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name for name in names if ".dist-info/" not in name} == expected
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_installed_wheel_finds_its_files(wheel: Path, tmp_path: Path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = """
import hive_ds, hive_ds.kernels
from hive_ds.recipe import load_recipe
from hive_ds.training.ds_config import read_policy
print(hive_ds.__file__, hive_ds.kernels.__file__)
print(load_recipe("tiny").name, read_policy("zero3")["zero_optimization"]["stage"])
"""
    files, values = python(code, tmp_path, tmp_path / "site").splitlines()
    assert all(file.startswith(str(tmp_path / "site")) for file in files.split())
    assert values == "tiny 3"


def test_declared_metadata(distribution: importlib.metadata.Distribution):
    metadata, commands = distribution.metadata, distribution.entry_points
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert set(metadata.get_all("Provides-Extra")) == {
        "streaming",
        "datasets",
        "flash",
        "liger",
        "chat",
        "timm",
        "open-clip",
        "eval",
        "wandb",
        "dev",
    }
    flash = [line for line in metadata.get_all("Requires-Dist") if 'extra == "flash"' in line]
    assert [re.split(r"[>=<; ]", line)[0] for line in flash] == ["flash-attn"]
    assert sorted((command.group, command.name, command.value) for command in commands) == [
        ("console_scripts", "hive-ds", "hive_ds.cli:main"),
        ("lmms_eval.models", "hive_ds", "hive_ds.evaluation.benchmarks.manifest:MANIFEST"),
    ]
    assert "Version 2.0, January 2004" in (ROOT / "LICENSE").read_text()


def test_the_oldest_versions_are_those_allowed(distribution: importlib.metadata.Distribution):
    """`tests/oldest.txt` pins every lower bound of what users install, but flash-attn, which only builds for a GPU."""
    allowed = {
        f"{needed.name}=={bound.version}"
        for needed in map(Requirement, distribution.requires or ())
        for bound in needed.specifier
        if bound.operator == ">=" and needed.name != "flash-attn" and 'extra == "dev"' not in str(needed.marker)
    }
    pinned = (ROOT / "tests/oldest.txt").read_text().splitlines()
    assert {line for line in pinned if not line.startswith("#")} == allowed


IMPORT_TRANSFORMERS = """
import transformers
from transformers import LlamaForCausalLM, SiglipVisionModel
import importlib.util
spec = importlib.util.find_spec("kernels")
print(spec.origin if spec else None)
"""


def test_transformers_imports_from_the_root_without_pypis_kernels():
    if importlib.util.find_spec("kernels") and importlib.util.find_spec("kernels").origin:
        pytest.skip("PyPI's kernels is installed here; pip uninstall kernels")
    assert python(IMPORT_TRANSFORMERS, ROOT).strip() == "None"


def test_transformers_imports_from_the_root_with_pypis_kernels(tmp_path: Path):
    declared = importlib.metadata.requires("transformers") or []
    wanted = next(line.partition(";")[0].strip() for line in declared if re.match(r"kernels\b", line))
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--retries", "0", "--timeout", "20"]
    done = subprocess.run([*command, "--target", str(tmp_path), wanted], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"pip could not fetch {wanted}, needs a network: {done.stderr.strip().splitlines()[-1]}")
    origin = python(IMPORT_TRANSFORMERS, ROOT, tmp_path).strip()
    assert origin == str(tmp_path / "kernels" / "__init__.py")


def make_targets() -> set[str]:
    text = (ROOT / "Makefile").read_text()
    return set(re.search(r"^\.PHONY: (.*)$", text, re.M)[1].split())


def test_make_help_lists_every_target():
    listed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert {line.split()[1] for line in listed.splitlines() if line.startswith("  make ")} == make_targets()
    assert subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True).stdout == listed


def test_files_that_begin_first_are_there() -> None:
    first = runpy.run_path(str(ROOT / "tests" / "conftest.py"))["FIRST"]
    assert [name for name in first if not (ROOT / "tests" / f"{name}.py").is_file()] == []


@pytest.mark.parametrize(
    ("python_code", "expected"),
    [
        (
            'case "$2" in *version_info*) exit 1;; esac; echo Python 3.8.1',
            "Python 3.8.1 is too old; expected Python 3.10",
        ),
        ('case "$2" in *ensurepip*) exit 1;; esac; exit 0', "has no venv module; on Debian or Ubuntu: apt-get install"),
        (None, "not found; install Python 3.10"),
    ],
)
def test_make_says_what_python_lacks(python_code: str | None, expected: str, tmp_path: Path):
    fake = tmp_path / "python3"
    if python_code:
        fake.write_text(f"#!/bin/sh\n{python_code}\n")
        fake.chmod(0o755)
    command = ["make", "venv", f"PYTHON={fake}", f"VENV={tmp_path}/venv"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert expected in done.stderr
    assert not (tmp_path / "venv").exists()


def test_dockerfile_follows_the_make_targets():
    with (ROOT / "Dockerfile").open("rb") as file:
        instructions = DockerfileParser(fileobj=file).structure
    by_name: dict[str, list[str]] = {}
    for instruction in instructions:
        by_name.setdefault(instruction["instruction"], []).append(instruction["value"])
    assert set(by_name) - {"COMMENT"} == {"FROM", "ENV", "RUN", "WORKDIR", "COPY", "CMD"}
    version = re.fullmatch(r"python:3\.(\d+)-slim", by_name["FROM"][0])
    assert version
    assert int(version[1]) >= 10
    (command,) = by_name["CMD"]
    assert json.loads(command) == ["make", "quickstart"]
    named = [target for run in by_name["RUN"] for target in re.findall(r"^make (\S+)", run)]
    assert named == ["venv"]
    assert {*named, "quickstart", "test"} <= make_targets()


def test_ci_script_ends_with_the_tests():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", str(script)], check=True)
    called = re.findall(r"^make (\S+)", script.read_text(), re.M)
    assert called == ["lint", "test"]
    assert set(called) <= make_targets()
