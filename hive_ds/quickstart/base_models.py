"""Tiny base models, made on the spot: a tokenizer, an LLM pretrained on text alone, an encoder pretrained on scenes.

Plain PyTorch loops in one process. Each ends as a stock Hugging Face folder, as if it came from the hub, and each is a
function of its data and seed, so that comparisons can start every arm from the same weights.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    SiglipVisionModel,
)

from hive_ds.constants import IGNORE_INDEX
from hive_ds.data.schema import Sample
from hive_ds.data.text import encode_sample

PAD, USER, ASSISTANT, END = "<|pad|>", "<|user|>", "<|assistant|>", "<|end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
Progress = Callable[[int, int, float], None]
"""Called after every step with (step, steps, loss)."""


@dataclass(frozen=True)
class LanguageModelSize:
    """Shape and training length of the tiny LLM."""

    vocabulary: int = 512
    layers: int = 4
    width: int = 128
    heads: int = 4
    kv_heads: int = 2
    mlp: int = 384
    positions: int = 512
    steps: int = 300
    batch: int = 16
    lr: float = 3e-3


@dataclass(frozen=True)
class VisionEncoderSize:
    """Shape and training length of the tiny encoder. The text tower beside it is thrown away."""

    image: int = 64
    patch: int = 8
    blocks: int = 4
    width: int = 96
    heads: int = 4
    mlp: int = 288
    text_blocks: int = 2
    text_positions: int = 16
    """Longer ones slow learning: SigLIP's text tower reads the last position, padding or not."""
    steps: int = 300
    batch: int = 48
    lr: float = 1e-3


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of at most ``vocabulary`` tokens with a chat template; any text encodes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PAD, USER, ASSISTANT, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[USER, ASSISTANT],
        model_input_names=["input_ids", "attention_mask"],  # the default has token types, which no LLM takes
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def pretrain_language_model(
    samples: Sequence[Sample],
    tokenizer: PreTrainedTokenizerFast,
    size: LanguageModelSize,
    *,
    seed: int,
    progress: Progress,
) -> LlamaForCausalLM:
    """Train a Llama from scratch on conversations without pictures; the loss is on the answers."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=size.width,
            intermediate_size=size.mlp,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            num_key_value_heads=size.kv_heads,
            max_position_embeddings=size.positions,
            initializer_range=size.width**-0.5,  # the usual 0.02 is for widths of thousands and learns slowly here
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    rows = [
        encode_sample(sample, tokenizer, template="chat", image_position="first", max_length=size.positions)
        for sample in samples
    ]

    def loss_of(indices: np.ndarray) -> torch.Tensor:
        batch = [rows[index] for index in indices]
        ids = _pad([row.input_ids for row in batch], tokenizer.pad_token_id)
        labels = _pad([row.labels for row in batch], IGNORE_INDEX)
        # Padding stands on the right, where causal attention keeps it from every token; no mask is needed.
        return model(input_ids=ids, labels=labels).loss

    _train(model, loss_of, len(rows), size.steps, size.batch, size.lr, seed, progress)
    return model


def pretrain_vision_encoder(
    images: Sequence[bytes],
    captions: Sequence[str],
    tokenizer: PreTrainedTokenizerFast,
    size: VisionEncoderSize,
    *,
    seed: int,
    progress: Progress,
) -> tuple[SiglipVisionModel, SiglipImageProcessor]:
    """Train a SigLIP encoder against a small text tower with the sigmoid loss; return the encoder and its processor."""
    torch.manual_seed(seed)
    model = SiglipModel(_siglip_config(size, tokenizer))
    with torch.no_grad():  # SigLIP's own start (arXiv 2303.15343): pairs are taken for unrelated until learned
        model.logit_scale.fill_(math.log(10))
        model.logit_bias.fill_(-10)
    processor = SiglipImageProcessor(size={"height": size.image, "width": size.image})
    pixels = torch.stack([_pixels(image, processor) for image in images])
    rows = [tokenizer(caption).input_ids[: size.text_positions] for caption in captions]
    ids = torch.full((len(rows), size.text_positions), tokenizer.pad_token_id)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row)

    def loss_of(indices: np.ndarray) -> torch.Tensor:
        return model(input_ids=ids[indices], pixel_values=pixels[indices], return_loss=True).loss

    _train(model, loss_of, len(rows), size.steps, size.batch, size.lr, seed, progress)
    encoder = SiglipVisionModel(model.config.vision_config).eval()
    trunk = getattr(encoder, "vision_model", encoder)  # transformers 5 has no inner module
    trunk.load_state_dict(model.vision_model.state_dict())
    return encoder, processor


def _siglip_config(size: VisionEncoderSize, tokenizer: PreTrainedTokenizerFast) -> SiglipConfig:
    shared = {"hidden_size": size.width, "intermediate_size": size.mlp, "num_attention_heads": size.heads}
    return SiglipConfig(
        text_config={
            **shared,
            "vocab_size": len(tokenizer),
            "num_hidden_layers": size.text_blocks,
            "max_position_embeddings": size.text_positions,
            "projection_size": size.width,
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
        },
        vision_config={
            **shared,
            "num_hidden_layers": size.blocks,
            "image_size": size.image,
            "patch_size": size.patch,
        },
    )


def _pixels(encoded: bytes, processor: SiglipImageProcessor) -> torch.Tensor:
    image = Image.open(io.BytesIO(encoded)).convert("RGB")
    return processor(image, return_tensors="pt")["pixel_values"][0]


def _pad(rows: Sequence[list[int]], value: int) -> torch.Tensor:
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)


def _batches(count: int, batch: int, seed: int) -> Iterator[np.ndarray]:
    """Endless random batches of indices, every index once an epoch (the last short batch is dropped)."""
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(count)
        yield from (order[start : start + batch] for start in range(0, max(1, count - batch + 1), batch))


def _train(
    model: nn.Module,
    loss_of: Callable[[np.ndarray], torch.Tensor],
    count: int,
    steps: int,
    batch: int,
    lr: float,
    seed: int,
    progress: Progress,
) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=steps + 1, pct_start=0.1)
    model.train()
    for step, indices in zip(range(1, steps + 1), _batches(count, batch, seed), strict=False):
        loss = loss_of(indices)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress(step, steps, loss.item())
    model.eval()


def save_folder(
    model: PreTrainedModel, processor: SiglipImageProcessor | PreTrainedTokenizerFast, folder: Path
) -> None:
    """Write model and processor as one stock Hugging Face folder."""
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
