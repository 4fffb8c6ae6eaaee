"""Scenes and the two base models as folders; the models are pretrained side by side, one process and one thread each.

Models this small gain nothing from a second thread, and two threads that wait for each other on a busy machine are many
times slower than one.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from hive_ds.children import process_pool
from hive_ds.data.scenes_samples import SceneFolders, write_scenes
from hive_ds.data.schema import Sample
from hive_ds.quickstart.base_models import (
    LanguageModelSize,
    VisionEncoderSize,
    pretrain_language_model,
    pretrain_vision_encoder,
    save_folder,
    train_tokenizer,
)
from hive_ds.quickstart.settings import Settings
from hive_ds.recipe import override


def draw_scenes(
    folders: SceneFolders, settings: Settings, seed: int, *, progress: Callable[[int, int], None] | None = None
) -> None:
    """Write the scenes that ``settings`` ask for."""
    write_scenes(
        folders.root,
        settings.scenes,
        seed,
        size=settings.image_size,
        held_out=settings.held_out,
        num_text=settings.text,
        num_captions=settings.captions,
        progress=progress,
    )


def make_base_models(
    scenes: SceneFolders,
    language_model: Path,
    vision_encoder: Path,
    sizes: tuple[LanguageModelSize, VisionEncoderSize],
    seed: int,
) -> None:
    """Pretrain an LLM on text alone and an encoder on captioned pictures; write both as stock Hugging Face folders."""
    samples = read_samples(scenes.text)
    tokenizer = train_tokenizer([turn.content for sample in samples for turn in sample.turns], sizes[0].vocabulary)
    jobs: tuple[tuple[Callable[..., None], Path, Path, Any], ...] = (
        (_make_language_model, scenes.text, language_model, sizes[0]),
        (_make_vision_encoder, scenes.captions, vision_encoder, sizes[1]),
    )
    with process_pool(len(jobs), "spawn", torch.set_num_threads, 1) as submit:
        for done in [submit(make, source, out, size, tokenizer, seed) for make, source, out, size in jobs]:
            done.result()


def folder_overrides(scenes: SceneFolders, language_model: Path, vision_encoder: Path) -> list[str]:
    """``--set`` options by which a recipe trains on these scenes and base models."""
    return [
        override("model.vision_encoder", vision_encoder),
        override("model.language_model", language_model),
        override("vlm.language_model", language_model),
        override("data.train", scenes.train),
        override("data.validation", scenes.validation),
    ]


def read_samples(folder: Path) -> list[Sample]:
    """All samples of a folder of MDS shards."""
    from hive_ds.data.mds import read_mds  # needs the [streaming] extra

    return read_mds(folder)


def _make_language_model(
    source: Path, out: Path, size: LanguageModelSize, tokenizer: PreTrainedTokenizerFast, seed: int
) -> None:
    bar = _loss_bar("language model", 0)
    model = pretrain_language_model(read_samples(source), tokenizer, size, seed=seed, progress=bar)
    save_folder(model, tokenizer, out)


def _make_vision_encoder(
    source: Path, out: Path, size: VisionEncoderSize, tokenizer: PreTrainedTokenizerFast, seed: int
) -> None:
    samples = read_samples(source)
    encoder, processor = pretrain_vision_encoder(
        [sample.images[0] for sample in samples],
        [sample.turns[-1].content for sample in samples],
        tokenizer,
        size,
        seed=seed,
        progress=_loss_bar("vision encoder", 1),
    )
    save_folder(encoder, processor, out)


def _loss_bar(name: str, position: int) -> Callable[[int, int, float], None]:
    bar = tqdm(desc=name, unit=" steps", position=position, dynamic_ncols=True)

    def update(step: int, steps: int, loss: float) -> None:
        bar.total = steps
        bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
        bar.update(step - bar.n)
        if step == steps:
            bar.close()

    return update
