"""Python blocks of README and docs run on tiny models; those that would take too long name only what is there."""

from __future__ import annotations

import ast
import importlib
import inspect
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from doc_pages import Block, blocks, page_names
from export_models import save_hive
from PIL import Image
from scene_models import save_cascaded_scene_model, save_scene_model
from tiny_models import tiny_language_model
from tutorial import PAGE as TUTORIAL

from hive_ds.export import export_encoder


def blocks_of(page: str) -> list[Block]:
    """The Python blocks of a page."""
    return [block for block in blocks(page) if block.language == "python"]


def readme_files() -> dict[str, Any]:
    save_scene_model(Path("runs/quickstart/stage3/model"))
    Image.new("RGB", (64, 64), "red").save("picture.png")
    return {}


def chat_files() -> dict[str, Any]:
    """A finished run, and the picture that the page's own command makes."""
    save_scene_model(Path("runs/quickstart/stage3/model"))
    Path("runs/quickstart/stage3/DONE").touch()
    commands = [block.text for block in blocks("docs/chat.md") if "python -c" in block.text]
    code = shlex.split(commands[0])[2]
    subprocess.run([sys.executable, "-c", code], check=True)
    return {}


def training_files() -> dict[str, Any]:
    save_cascaded_scene_model(Path("RUN/stage5/model"))
    return {}


def export_files() -> dict[str, Any]:
    """An encoder in each format, CLIP: open_clip builds it without a name."""
    for library in ("timm", "open_clip"):
        pytest.importorskip(library, reason=f"{library} is not installed; pip install 'hive-ds[{library}]'")
    save_hive(Path("model"), "clip")
    for format, folder in {"transformers": "encoder", "timm": "encoder-timm", "open_clip": "encoder-open"}.items():
        export_encoder("model", folder, format=format)
    Image.new("RGB", (64, 64), "red").save("picture.jpg")
    return {}


def kernel_files() -> dict[str, Any]:
    """A folder by the name of the hub's model, which transformers then takes."""
    tiny_language_model().save_pretrained("HuggingFaceTB/SmolLM2-360M")
    return {}


RUN: dict[str, tuple[Callable[[], dict[str, Any]], Callable[[dict[str, Any]], bool]]] = {
    "README.md": (
        readme_files,
        lambda names: names["processor"].decode(names["tokens"]).endswith(f"circle?{names['answer']}"),
    ),
    "docs/attention.md": (dict, lambda names: names["out"].shape == (8, 4, 16)),
    "docs/chat.md": (chat_files, lambda names: names["maps"].layers[0].on_patches(0).shape[1:] == (4, 4)),
    "docs/training.md": (training_files, lambda names: names["model"].projector is not None),
    "docs/export.md": (export_files, lambda names: names["features"].shape == (1, 16, 32)),
    "docs/kernel.md": (kernel_files, lambda names: names["model"].config._attn_implementation == "hive"),
}
"""Page -> what its block finds when it runs, and whether what it made is as it should be."""


OTHERS = [page for page in page_names() if blocks_of(page) and page not in (*RUN, TUTORIAL)]
"""Pages whose blocks are read alone."""


@pytest.mark.parametrize("page", RUN)
def test_blocks_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    prepare, is_right = RUN[page]
    names = prepare()
    assert blocks_of(page)
    for block in blocks_of(page):
        exec(compile(block.text, block.place, "exec"), names)
    assert is_right(names)


@pytest.mark.parametrize("page", OTHERS)
def test_blocks_name_what_is_there(page: str):
    assert [fault for block in blocks_of(page) for fault in faults_of(block.text)] == []


def faults_of(code: str) -> list[str]:
    """Imports of what is not there, and keywords that what was imported does not take."""
    tree, found, names = ast.parse(code), [], {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module or "")
            for name in node.names:
                names[name.asname or name.name] = getattr(module, name.name, None)
                found += [] if hasattr(module, name.name) else [f"{node.module} has no {name.name}"]
    for node in ast.walk(tree):
        called = names.get(node.func.id) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else None
        if called is not None:
            known = inspect.signature(called).parameters
            given = [keyword.arg for keyword in node.keywords if keyword.arg]
            found += [f"{node.func.id} takes no {name}" for name in given if name not in known]
    return found


def test_planted_faults_are_found():
    code = "from hive_ds.recipe import load_recipe, load_recipes\nload_recipe('tiny', override=[])"
    assert faults_of(code) == ["hive_ds.recipe has no load_recipes", "load_recipe takes no override"]
