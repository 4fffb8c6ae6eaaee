"""Model FLOPs of a batch in closed form, and how fast this device multiplies matrices.

The count covers the matrix products that a step needs; recomputation under gradient checkpointing, norms, softmax and
the optimizer are left out, as is usual for MFU. For a weight of n elements that acts on t tokens:

    2nt forward, + 2nt where a gradient flows on to its input, + 2nt where the weight trains.

Attention adds 4 * heads * head_dim * pairs forward and twice that backward, over the visible (query, key) pairs.
Gradients flow through the LLM from its head down to the first routed layer, where image features enter; lower layers
have a forward pass only, unless something below them trains. A cascaded model's image features enter at the input.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from hive_ds.model.language import head_dim_of
from hive_ds.training.groups import StagePlan


@dataclass(frozen=True)
class BatchSize:
    """What a batch asks of the model."""

    text_tokens: int
    supervised_tokens: int
    patches: int
    """Patches of all images, the dummy image of a batch without images included."""
    text_pairs: int
    """Visible (text query, text key) pairs of one layer."""
    image_pairs: int
    """Visible (text query, patch) pairs of one routed block."""
    encoder_pairs: int
    """(patch, patch) pairs of one encoder block."""
    sequence_tokens: int
    """Tokens of sequences that hold text and the patches that some text sees, as a cascaded model's."""
    sequence_pairs: int
    """Visible (query, key) pairs of one layer over such sequences."""

    @classmethod
    def of(
        cls,
        text_lengths: Sequence[int],
        image_offsets: Sequence[Sequence[int]],
        supervised: int,
        patches: Sequence[int],
    ) -> BatchSize:
        """Count a batch.

        Args:
            text_lengths: tokens of each sample.
            image_offsets: media offsets of each sample's images.
            supervised: tokens with a label.
            patches: of each image, in the order of the offsets.
        """
        sizes, image_pairs, sequences = iter(patches), 0, []
        for length, offsets in zip(text_lengths, image_offsets, strict=True):
            images = [(length - offset, next(sizes)) for offset in offsets]
            image_pairs += sum(seen_by * size for seen_by, size in images)
            sequences.append(length + sum(size for seen_by, size in images if seen_by))
        return cls(
            text_tokens=sum(text_lengths),
            supervised_tokens=supervised,
            patches=sum(patches),
            text_pairs=_causal_pairs(text_lengths),
            image_pairs=image_pairs,
            encoder_pairs=sum(count**2 for count in patches),
            sequence_tokens=sum(sequences),
            sequence_pairs=_causal_pairs(sequences),
        )


NOTHING = BatchSize(0, 0, 0, 0, 0, 0, 0, 0)
COUNTS = ("text_tokens", "supervised_tokens", "patches", "sequence_tokens")
"""What products with weights are linear in."""


def _causal_pairs(lengths: Sequence[int]) -> int:
    return sum(length * (length + 1) // 2 for length in lengths)


class FlopCounter:
    """FLOPs of training on a batch, per model and stage.

    Args:
        model: a `HiveForCausalLM` or a `CascadedForCausalLM`, whose image tokens pass through the LLM.
        plan: what trains.
    """

    def __init__(self, model: Any, plan: StagePlan) -> None:
        text = model.config.text_config
        self._text_width: int = text.num_attention_heads * head_dim_of(text)
        self._vision_width: int = model.config.vision_config.hidden_size
        self._trains = plan.trained_groups
        self._in_sequence = not hasattr(model, "routes")
        blocks_by_layer = {} if self._in_sequence else model.routes.blocks_by_layer
        self._routes = {layer: len(blocks) for layer, blocks in blocks_by_layer.items()}
        self._shared = not any(group == "image_kv" for group in plan.group_of.values())
        self._layers: int = text.num_hidden_layers
        self._blocks: int = model.last_vision_block
        everywhere = self._in_sequence or "language_model" in self._trains
        self._first_layer = -1 if everywhere else min(blocks_by_layer)
        self._weights = [
            (name, plan.group_of[name], math.prod(shape))
            for name, shape in plan.shapes.items()
            if len(shape) > 1 and name.endswith("weight")
        ]
        self._head = text.vocab_size * text.hidden_size
        self._encoder_trains = "vision_encoder" in self._trains
        scaled = any("layer_scale" in name for name in plan.shapes)
        self._last_products = ("mlp.down_proj.weight",) + (() if scaled else ("mlp.fc2.weight",))
        self._products = {what: self._products_of(replace(NOTHING, **{what: 1})) for what in COUNTS}

    def count(self, batch: BatchSize) -> float:
        """FLOPs of forward and backward over ``batch``."""
        return sum(self.parts(batch).values())

    def parts(self, batch: BatchSize) -> dict[str, float]:
        """The same by part: ``vision_encoder``, ``projectors``, ``language_model`` and its ``head``."""
        # Linear in what is counted, and looked up for every micro-batch.
        counted = {
            part: sum(self._products[what][part] * getattr(batch, what) for what in COUNTS)
            for part in ("vision_encoder", "projectors", "language_model")
        }
        counted["head"] = 2.0 * self._head * batch.supervised_tokens * (2 + ("language_model" in self._trains))
        counted["language_model"] += self._language_attention(batch, below=1, above=3)
        counted["vision_encoder"] += self._encoder_attention(batch, 3 if self._encoder_trains else 1)
        return counted

    def _products_of(self, batch: BatchSize) -> dict[str, float]:
        """FLOPs of all products with weights but the head's, by part."""
        counted = dict.fromkeys(("vision_encoder", "projectors", "language_model"), 0.0)
        for name, group, size in self._weights:
            part = group if group in counted else "language_model"
            for tokens, flows in self._uses(name, group, batch):
                counted[part] += 2.0 * size * tokens * (1 + flows + (group in self._trains))
        return counted

    def repeated(self, batch: BatchSize, *, checkpointing: bool) -> float:
        """What backward computes once more: HFU counts it, MFU does not.

        Fused attention repeats the scores, half of its forward. Gradient checkpointing repeats the forward of every
        encoder block and LLM layer that a gradient flows through, up to the last value that backward needs: not its
        last product, unless a layer scale follows it.
        """
        passes = 0.5 + checkpointing
        attention = self._language_attention(batch, below=0, above=passes)
        attention += self._encoder_attention(batch, passes * self._encoder_trains)
        if not checkpointing:
            return attention
        again = [(name, group, size) for name, group, size in self._weights if self._runs_again(name, group)]
        return attention + sum(
            2.0 * size * tokens for name, group, size in again for tokens, _ in self._uses(name, group, batch)
        )

    def _runs_again(self, name: str, group: str) -> bool:
        """Whether checkpointing repeats the product of a weight."""
        if name.endswith(self._last_products):
            return False
        if group == "vision_encoder":
            return self._encoder_trains and "patch_embed" not in name
        return group != "projectors" and _layer_of(name) >= max(self._first_layer, 0)

    def _uses(self, name: str, group: str, batch: BatchSize) -> list[tuple[int, bool]]:
        """For each input of a weight: its tokens, and whether a gradient flows on to it."""
        if group == "vision_tail" or re.search("embed_tokens|lm_head|position_embedding", name):
            return []  # never runs, is counted as the head, or looks rows up
        if group == "vision_encoder":
            return [(batch.patches, self._encoder_trains and "patch_embed" not in name)]
        if group == "projectors":
            # A cascaded model's begins with a product, whose input asks for a gradient if the encoder trains.
            return [(batch.patches, self._encoder_trains or not name.startswith("projector.linear_1"))]
        layer = _layer_of(name)
        routes = self._routes.get(layer, 0)
        if group == "image_kv":
            return [(routes * batch.patches, True)]
        # What enters the first of these layers is plain text, which asks for no gradient.
        enters = layer == self._first_layer and re.search(r"self_attn\.[qkv]_proj\.", name)
        tokens = batch.sequence_tokens if self._in_sequence else batch.text_tokens
        if not self._in_sequence and layer == self._layers - 1 and re.search(r"o_proj|mlp", name):
            tokens = batch.supervised_tokens  # see `hive_ds.model.last_layer`
        uses = [(tokens, layer >= self._first_layer and not enters)]
        if self._shared and routes and re.search(r"self_attn\.[kv]_proj\.", name):
            uses.append((routes * batch.patches, True))
        return uses

    def _language_attention(self, batch: BatchSize, *, below: float, above: float) -> float:
        """Forwards' worth of FLOPs: ``below`` at layers with a forward pass only, ``above`` at the others."""
        first = max(self._first_layer, 0)
        pairs = batch.sequence_pairs if self._in_sequence else batch.text_pairs
        text = pairs * (below * first + above * (self._layers - first))
        return 4.0 * self._text_width * (text + above * batch.image_pairs * sum(self._routes.values()))

    def _encoder_attention(self, batch: BatchSize, passes: float) -> float:
        return passes * 4.0 * self._vision_width * batch.encoder_pairs * self._blocks


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs per second of a large square matrix product on this device, the best of five."""
    return 2 * _size(device) ** 3 / min(matmul_times(device, dtype))


def warn_of_slow_bf16(device: torch.device, dtype: torch.dtype, rate: float) -> str | None:
    """A warning where the CPU has no bf16 instructions, so that PyTorch's matrix products are many times slower."""
    if device.type != "cpu" or dtype != torch.bfloat16:
        return None
    single = matmul_rate(device, torch.float32)
    if single < 4 * rate:
        return None
    found = f"{single / rate:.0f} times as fast in fp32 ({single / 1e9:.0f} GFLOP/s) as in bf16 ({rate / 1e9:.1f})"
    return f"warning: this CPU multiplies {found}; --set training.precision=fp32"


def matmul_times(device: torch.device, dtype: torch.dtype) -> list[float]:
    """Seconds of each of five large square matrix products on this device."""
    size = _size(device)
    own = torch.Generator(device).manual_seed(0)  # the run's random numbers stay as they are
    left = torch.randn(size, size, device=device, dtype=dtype, generator=own)
    right = torch.randn(size, size, device=device, dtype=dtype, generator=own)
    times = []
    for _ in range(6):  # the first one warms up
        _wait(device)
        start = time.perf_counter()
        left @ right
        _wait(device)
        times.append(time.perf_counter() - start)
    return times[1:]


def _size(device: torch.device) -> int:
    return 8192 if device.type == "cuda" else 512


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _layer_of(name: str) -> int:
    match = re.search(r"language_model\.model\.layers\.(\d+)\.", name)
    return int(match[1]) if match else -1
