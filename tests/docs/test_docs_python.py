"""Every Python block of README and docs runs on tiny models; one that cannot names only what is there."""

from __future__ import annotations

import ast
import importlib
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from doc_pages import Block, blocks, page_names
from PIL import Image
from scene_models import save_cascaded_scene_model, save_scene_model
from tiny_models import tiny_language_model
from tutorial import PAGE as TUTORIAL

NAMED_ONLY = {"docs/probes.md": "thousands of pictures and a solver"}
"""Pages whose block would take too long; why."""


def block_of(page: str) -> Block:
    """The only Python block of a page."""
    (block,) = (block for block in blocks(page) if block.language == "python")
    return block


def attention_arguments() -> dict[str, Any]:
    """What the contract's call names without making it: q (T,H,K), k and v (T,G,K), image_k and image_v (N,G,K)."""
    torch.manual_seed(0)
    shapes = {"q": (8, 4, 16), "k": (8, 2, 16), "v": (8, 2, 16), "image_k": (16, 2, 16), "image_v": (16, 2, 16)}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


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


def kernel_files() -> dict[str, Any]:
    """A folder by the name of the hub's model, which transformers then takes."""
    tiny_language_model().save_pretrained("HuggingFaceTB/SmolLM2-360M")
    return {}


RUN: dict[str, tuple[Callable[[], dict[str, Any]], Callable[[dict[str, Any]], bool]]] = {
    "README.md": (readme_files, lambda names: isinstance(names["processor"].decode(names["answer"][0]), str)),
    "docs/attention.md": (attention_arguments, lambda names: names["out"].shape == (8, 4, 16)),
    "docs/chat.md": (chat_files, lambda names: names["maps"].layers[0].on_patches(0).shape[1:] == (4, 4)),
    "docs/training.md": (training_files, lambda names: names["model"].projector is not None),
    "docs/kernel.md": (kernel_files, lambda names: names["model"].config._attn_implementation == "hive"),
}
"""Page -> what its block finds when it runs, and whether what it made is as it should be."""


def test_every_block_is_in_a_table():
    with_python = {page for page in page_names() if any(block.language == "python" for block in blocks(page))}
    assert with_python == {*RUN, *NAMED_ONLY, TUTORIAL}


@pytest.mark.parametrize("page", RUN)
def test_blocks_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    prepare, is_right = RUN[page]
    names = prepare()
    block = block_of(page)
    exec(compile(block.text, block.place, "exec"), names)
    assert is_right(names)
    assert os.getcwd() == str(tmp_path)


@pytest.mark.parametrize("page", NAMED_ONLY)
def test_blocks_name_what_is_there(page: str):
    block = block_of(page)
    compile(block.text, block.place, "exec")
    imported = [node for node in ast.walk(ast.parse(block.text)) if isinstance(node, ast.ImportFrom)]
    assert imported
    for node in imported:
        module = importlib.import_module(node.module or "")
        assert [name.name for name in node.names if not hasattr(module, name.name)] == []
