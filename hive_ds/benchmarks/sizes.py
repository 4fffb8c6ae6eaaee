"""Models with random weights at the paper's size and at a size for CPUs, and the batches that they are timed on."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, SiglipVisionConfig

from hive_ds.constants import IGNORE_INDEX
from hive_ds.cost.known_models import KNOWN_MODELS
from hive_ds.data.batch import Normalisation, PackedBatch
from hive_ds.model.cascaded import CascadedForCausalLM, cascaded_config
from hive_ds.model.configuration import HiveConfig
from hive_ds.model.hive import HiveForCausalLM
from hive_ds.stages import Stage

CAPTIONS = Path(__file__).with_name("caption_lengths.json")
"""Lengths of real captions, measured, and where they were found."""


@dataclass(frozen=True)
class Size:
    """Shapes of the two models, their routes, and what is timed."""

    name: str
    vision: dict[str, int]
    text: dict[str, Any]
    vision_blocks: tuple[int, ...]
    language_layers: tuple[int, ...]
    captions: tuple[int, ...]
    """Micro-batches of captioned images, small to large; each way of training goes as far as memory lets it."""
    lengths: tuple[tuple[int, tuple[int, ...]], ...]
    """(text length, micro-batches small to large) of the sweep, the most telling length first."""
    caption_scale: float
    """Tokens of a caption, beside those of a real one."""


def _published(name: str) -> dict[str, Any]:
    return {key: value for key, value in KNOWN_MODELS[name].config.items() if key != "model_type"}


PAPER = Size(
    name="SigLIP-L/16-384 + MobileLLM-600M",
    vision=_published("google/siglip-large-patch16-384"),
    text=_published("facebook/MobileLLM-600M"),
    vision_blocks=(2, 5, 8, 11, 14, 17, 20, 23),
    language_layers=(4, 9, 14, 19, 24, 29, 34, 39),
    captions=(32, 96, 192),
    lengths=((2048, (8, 24)), (512, (32, 96)), (128, (64, 192)), (32, (64, 256))),
    caption_scale=1.0,
)
TINY = Size(
    name="tiny models",
    vision={
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    },
    text={
        "vocab_size": 96,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
    },
    vision_blocks=(1, 2),
    language_layers=(0, 2),
    captions=(2,),
    lengths=((32, (2,)),),
    caption_scale=0.05,
)


def build_hive(size: Size, stage: Stage, device: torch.device, dtype: torch.dtype) -> HiveForCausalLM:
    """HIVE with the paper's norms, random weights from seed 0."""
    torch.manual_seed(0)
    config = HiveConfig(
        SiglipVisionConfig(**size.vision),
        LlamaConfig(**size.text),
        size.vision_blocks,
        size.language_layers,
        qk_norm="post_rope",
        image_kv=stage.image_kv,
    )
    with device:
        model = HiveForCausalLM(config)
    return model.to(device, dtype).train()


def build_cascaded(size: Size, device: torch.device, dtype: torch.dtype) -> CascadedForCausalLM:
    """The same two models joined as SA joins them."""
    torch.manual_seed(0)
    vision, text = SiglipVisionConfig(**size.vision), LlamaConfig(**size.text)
    config = cascaded_config(vision, text, feature_block=-2, image_token_id=0, vision_sha256="")
    with device:
        model = CascadedForCausalLM(config)
    return model.to(device, dtype).train()


@cache
def real_captions() -> list[int]:
    """Tokens of Florence-2's more detailed captions, end included (`CAPTIONS` has their source, and other kinds).

    The recipe trains on Florence captions. Of the kinds that were measured these are the most alike in length, so
    padding costs least where it is done.
    """
    found: list[int] = json.loads(CAPTIONS.read_text())["kinds"]["Florence-2, more detailed"]["lengths"]
    return found


def caption_lengths(size: Size, count: int, seed: int) -> list[int]:
    """Lengths of ``count`` captions, drawn with replacement from real ones; one token more starts a text."""
    generator = torch.Generator().manual_seed(seed)
    real = torch.tensor(real_captions())
    drawn = real[torch.randint(len(real), (count,), generator=generator)]
    return (1 + drawn * size.caption_scale).round().int().tolist()


SIGLIP = Normalisation((1 / 127.5,) * 3, (-1.0,) * 3)


@cache
def noise(count: int, side: int) -> Tensor:
    """Images (count, 3, side, side) in levels, as loaders hand them over; in pinned memory if there is a GPU."""
    made = torch.randint(256, (count, 3, side, side), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return made.pin_memory() if torch.cuda.is_available() else made


def make_batch(size: Size, lengths: Sequence[int], seed: int) -> PackedBatch:
    """One image before each text; all tokens but each text's first carry loss. As a loader hands it over.

    Batches share their images: what is in a picture takes no time, and hundreds of them much memory.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, size.text["vocab_size"], (sum(lengths),), generator=generator)
    labels = ids.clone()
    starts = torch.tensor([0, *lengths]).cumsum(0)[:-1]
    labels[starts] = IGNORE_INDEX
    images = noise(2 ** math.ceil(math.log2(len(lengths))), size.vision["image_size"])[: len(lengths)]
    batch = PackedBatch(
        input_ids=ids,
        labels=labels,
        text_lengths=list(lengths),
        image_offsets=[[0] for _ in lengths],
        images={"pixel_values": images},
        sample_ids=[str(index) for index in range(len(lengths))],
        num_images=len(lengths),
        normalise=SIGLIP,
    )
    return batch.pin_memory() if torch.cuda.is_available() else batch
