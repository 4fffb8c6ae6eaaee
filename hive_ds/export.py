"""Export the trained vision encoder as a stock Hugging Face folder, checked before it is called done."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoImageProcessor, BaseImageProcessor

from hive_ds.errors import HiveError
from hive_ds.model.attention_backends import TrainedModel
from hive_ds.model.hive import HiveForCausalLM
from hive_ds.model.loading import load_any
from hive_ds.model.vision import encode_images, vision_class

TOLERANCE = 1e-5
"""Largest difference between features before and after, in fp32."""
PARITY_IMAGES = 2
WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class ExportReport:
    """What was exported, and how well it reads back."""

    folder: Path
    model_class: str
    num_blocks: int
    trained_blocks: int
    """Blocks up to the last routed one; those after it kept the weights that they started with."""
    largest_difference: float
    """Between features of routed blocks in HIVE and in plain transformers."""
    sha256: str
    """Of the weights file."""


def export_encoder(source: str | Path, out: str | Path) -> ExportReport:
    """Write the vision encoder of a HIVE model, with its image processor and a model card, to the new folder ``out``.

    The encoder is whole: blocks after the last routed one, the final norm and the pooling head are kept as they were
    before training, for no gradient reaches them. It is then read back with plain transformers, and the features of
    every routed block must equal HIVE's to 1e-5.

    Args:
        source: a run's folder (its last finished stage is taken) or a model's.
        out: folder to write; it must not hold files.

    Raises:
        HiveError: no model in ``source``, ``out`` holds files, or the features differ.
    """
    folder, out = model_folder(source), Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise HiveError(f"export folder {out}: exists and is not an empty folder; name a new one or remove it")
    model = load_any(folder).float()
    processor = AutoImageProcessor.from_pretrained(folder)
    aside = out.absolute().with_name(f".{out.name}.partial-{os.getpid()}")
    try:
        report = _write(model, processor, aside, out)
        if out.exists():
            out.rmdir()
        aside.rename(out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return report


def _write(model: TrainedModel, processor: BaseImageProcessor, aside: Path, out: Path) -> ExportReport:
    """Write the folder ``aside``, which is to become ``out``, and check it."""
    encoder = model.vision_encoder
    encoder.save_pretrained(aside)
    processor.save_pretrained(aside)
    difference = _largest_difference(model, aside, processor)
    if not difference <= TOLERANCE:
        raise HiveError(
            f"export {out}: features read back differ by {difference:.1e}, expected at most {TOLERANCE:.0e}; "
            "nothing was exported"
        )
    report = ExportReport(
        folder=out,
        model_class=type(encoder).__name__,
        num_blocks=encoder.config.num_hidden_layers,
        trained_blocks=model.last_vision_block,
        largest_difference=difference,
        sha256=hashlib.sha256((aside / WEIGHTS).read_bytes()).hexdigest(),
    )
    (aside / "README.md").write_text(model_card(report, model))
    return report


def model_folder(source: str | Path) -> Path:
    """The folder of a model's weights: ``source`` itself, or the last finished one of a run's stages 1 to 3.

    Raises:
        HiveError: neither is there.
    """
    source = Path(source)
    if (source / "config.json").is_file():
        return source
    stages = [
        (int(match[1]), path) for path in source.glob("stage*") if (match := re.fullmatch(r"stage([123])", path.name))
    ]
    finished = [path / "model" for _, path in sorted(stages) if (path / "DONE").is_file()]
    if not finished:
        raise HiveError(f"{source}: neither a model folder (config.json) nor a run with a finished stage (stageN/DONE)")
    return finished[-1]


@torch.no_grad()
def _largest_difference(model: TrainedModel, folder: Path, processor: BaseImageProcessor) -> float:
    """Over the routed blocks, on random pictures, between HIVE and the folder read by plain transformers."""
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randint(0, 256, (PARITY_IMAGES, 96, 96, 3), generator=generator, dtype=torch.uint8)
    inputs = {name: value for name, value in processor(list(pictures.numpy()), return_tensors="pt").items()}
    restored = vision_class(model.vision_encoder.config).from_pretrained(folder, dtype=torch.float32).eval()
    hidden_states = restored(**inputs, output_hidden_states=True).hidden_states
    expected = encode_images(model.vision_encoder, model.feature_blocks, **inputs).by_block
    mask = inputs.get("pixel_attention_mask")
    return max(
        float((features - _patch_tokens(hidden_states[block], len(features), mask)).abs().max())
        for block, features in expected.items()
    )


def _patch_tokens(hidden: torch.Tensor, patches: int, mask: torch.Tensor | None) -> torch.Tensor:
    """(I, P, D) -> (N, D): without padding or, where there is no mask, without leading class and register tokens."""
    if mask is not None:
        return hidden[mask.bool()]
    return hidden[:, hidden.shape[1] - patches // len(hidden) :].flatten(0, 1)


def model_card(report: ExportReport, model: TrainedModel) -> str:
    """Text of the exported folder's README.md."""
    if isinstance(model, HiveForCausalLM):
        method = "HIVE's hierarchical cross-attention (arXiv 2604.00086)"
        routes = ", ".join(f"{block}->{layer}" for block, layer in model.routes.pairs)
        read = f"Routes (vision block -> LLM layer): {routes}."
    else:
        method = "the self-attention baseline of HIVE (arXiv 2604.00086)"
        read = f"Features of block {model.last_vision_block} were tokens at the LLM's input."
    if report.trained_blocks == report.num_blocks:
        tail = "Every block was trained. The final norm and the pooling head were not: no gradient reaches them."
    else:
        tail = (
            f"Blocks {report.trained_blocks + 1} to {report.num_blocks}, the final norm and the pooling head come "
            "after the last routed block: no gradient reached them. They are kept here as they were before training, "
            f"and were never fitted to the trained ones. Take `hidden_states[{report.trained_blocks}]` where in doubt."
        )
    return f"""---
library_name: transformers
tags: [hive, vision]
---
# Vision encoder pre-trained with a language model

A stock `{report.model_class}` of {report.num_blocks} blocks. It loads in plain transformers:

    from transformers import {report.model_class}
    encoder = {report.model_class}.from_pretrained("{report.folder.name}")

Trained by {method} through a language model.
{read}

{tail}

Features of these blocks, read back by plain transformers, equal those in training to
{report.largest_difference:.1e} (fp32). sha256 of the weights: {report.sha256}
"""
