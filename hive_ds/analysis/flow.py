"""How much gradient reaches each encoder block, what each route is worth, and how far blocks have moved.

All of it over the same samples for every model, so that HIVE, the cascaded model and others can be compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from hive_ds.analysis.block_gradients import block_gradients
from hive_ds.analysis.linear_cka import LinearCka
from hive_ds.analysis.samples import Subject
from hive_ds.data.batch import PackedBatch
from hive_ds.data.schema import Sample
from hive_ds.errors import HiveError
from hive_ds.model.hive import HiveForCausalLM
from hive_ds.model.routes import Routes
from hive_ds.model.vision import encode_images, vision_blocks

TOGETHER = 8
"""Samples in one forward pass."""


@dataclass(frozen=True)
class Flow:
    """What was found of one model.

    Attributes:
        name: of the model.
        kind: ``hive`` or ``cascaded``.
        read_by: what reads each block of the encoder, in words; empty where nothing does.
        loss: mean over supervised tokens, nats.
        supervised_tokens: their number.
        norms: L2 norm of the loss's gradient at each block's output, over all patches and channels of all samples; no
            entry for a block that the loss does not reach.
        knocked_out: loss without each route, (block, layer); of a HIVE model, where asked for.
        without_images: loss without any route, likewise.
        similarity: linear CKA of each block's features with those of the initial encoder, where asked for.
    """

    name: str
    kind: str
    read_by: dict[int, str]
    loss: float
    supervised_tokens: int
    norms: dict[int, float]
    knocked_out: dict[tuple[int, int], float] = field(default_factory=dict)
    without_images: float | None = None
    similarity: dict[int, float] = field(default_factory=dict)

    def values(self) -> dict[str, Any]:
        """For JSON."""
        routes = [
            {"block": block, "layer": layer, "loss": loss, "change": loss - self.loss}
            for (block, layer), loss in self.knocked_out.items()
        ]
        return {
            "checkpoint": self.name,
            "kind": self.kind,
            "loss": self.loss,
            "supervised_tokens": self.supervised_tokens,
            "blocks": [
                {
                    "block": block,
                    "read_by": readers,
                    "norm": self.norms.get(block),
                    "similarity": self.similarity.get(block),
                }
                for block, readers in self.read_by.items()
            ],
            "routes": routes,
            "loss_without_images": self.without_images,
        }

    def lines(self) -> list[str]:
        """For people."""
        lines = [f"{self.name}: loss {self.loss:.4f} over {self.supervised_tokens} supervised tokens"]
        similar = "CKA with initial" if self.similarity else ""
        lines.append(f"  {'block':<7}{'read by':<16}{'gradient norm':<15}{similar}".rstrip())
        for block, readers in self.read_by.items():
            norm = f"{self.norms[block]:.4g}" if block in self.norms else "no gradient"
            similar = f"{self.similarity[block]:.4f}" if block in self.similarity else ""
            lines.append(f"  {block:<7}{readers:<16}{norm:<15}{similar}".rstrip())
        for (block, layer), loss in self.knocked_out.items():
            lines.append(f"  without block {block} → layer {layer}: loss {loss:.4f} ({loss - self.loss:+.4f})")
        if self.without_images is not None:
            change = self.without_images - self.loss
            lines.append(f"  without any route: loss {self.without_images:.4f} ({change:+.4f})")
        return lines


def gradient_flow(
    subject: Subject,
    samples: Sequence[Sample],
    *,
    knock_out: bool = False,
    initial: PreTrainedModel | None = None,
) -> Flow:
    """Gradient norms of ``samples`` as one batch and, if asked for, knock-outs and similarity to an encoder.

    Args:
        subject: the model.
        samples: with images.
        knock_out: measure what each route is worth, if the model has routes.
        initial: the encoder that training started from, on the model's device and in its dtype.

    Raises:
        HiveError: a sample does not fit the model, or ``initial`` is of another kind than the model's encoder.
    """
    batches = [subject.batch(samples[start : start + TOGETHER]) for start in range(0, len(samples), TOGETHER)]
    tokens = sum(batch.supervised_tokens for batch in batches)
    loss, squares = 0.0, dict.fromkeys(range(1, subject.num_blocks + 1), 0.0)
    for batch in batches:
        found = block_gradients(subject.model, {**_inputs(subject, batch), "num_items_in_batch": tokens})
        loss += found.loss
        for block, norm in found.norms().items():
            squares[block] += norm**2
    routed = isinstance(subject.model, HiveForCausalLM)
    knocked_out, without_images = losses_without_routes(subject, batches) if routed and knock_out else ({}, None)
    return Flow(
        name=subject.name,
        kind="hive" if routed else "cascaded",
        read_by={block: subject.read_by(block) for block in squares},
        loss=loss,
        supervised_tokens=tokens,
        norms={block: square**0.5 for block, square in squares.items() if square},
        knocked_out=knocked_out,
        without_images=without_images,
        similarity={} if initial is None else similarity_by_block(subject, initial, batches),
    )


@torch.no_grad()
def losses_without_routes(
    subject: Subject, batches: Sequence[PackedBatch]
) -> tuple[dict[tuple[int, int], float], float]:
    """Mean loss with the image keys of one route hidden, for each route (block, layer), and of all routes at once.

    Nothing else changes: a layer that loses its only route keeps the q/k norms that came with it.
    """
    model = subject.model
    assert isinstance(model, HiveForCausalLM)
    pairs = model.routes.pairs
    hidden = [*((pair,) for pair in pairs), pairs]
    sums = torch.zeros(len(hidden), dtype=torch.float64)
    for batch in batches:
        inputs = _inputs(subject, batch)
        pixels = {name: inputs.pop(name) for name in batch.images}
        offsets = inputs.pop("image_offsets")
        images = model.encode_prompt_images(image_offsets=offsets, prompts=len(offsets), **pixels)
        for place, routes in enumerate(hidden):
            with _without(model, routes):
                sums[place] += float(model(**inputs, prompt_images=images, num_items_in_batch=1).loss)
    *losses, all_hidden = (sums / sum(batch.supervised_tokens for batch in batches)).tolist()
    return dict(zip(pairs, losses, strict=True)), all_hidden


@contextmanager
def _without(model: HiveForCausalLM, hidden: Sequence[tuple[int, int]]) -> Iterator[None]:
    """The model without these routes inside."""
    usual = model.routes
    model.routes = Routes(tuple(pair for pair in usual.pairs if pair not in hidden))
    try:
        yield
    finally:
        model.routes = usual


@torch.no_grad()
def similarity_by_block(subject: Subject, initial: PreTrainedModel, batches: Sequence[PackedBatch]) -> dict[int, float]:
    """Linear CKA between the features of each block and those of the initial encoder on the same patches.

    All blocks are compared, those after the last that is read, too: their weights have not moved, their input has.

    Raises:
        HiveError: the encoders differ in type, depth or patches.
    """
    encoder = subject.model.vision_encoder
    _check_alike(subject, encoder.config, initial.config)
    blocks = range(1, len(vision_blocks(encoder)) + 1)
    similarity = {block: LinearCka() for block in blocks}
    for batch in batches:
        inputs = _inputs(subject, batch)
        pixels = {name: inputs[name] for name in batch.images}
        trained, before = (encode_images(one, blocks, **pixels).by_block for one in (encoder, initial))
        for block, one in similarity.items():
            one.add(trained[block], before[block])
    return {block: one.value() for block, one in similarity.items()}


def _check_alike(subject: Subject, config: Any, initial: Any) -> None:
    for name in ("model_type", "num_hidden_layers", "patch_size", "image_size"):
        ours, theirs = getattr(config, name, None), getattr(initial, name, None)
        if ours != theirs:
            raise HiveError(f"initial encoder with {name} {theirs}: expected {ours}, as the encoder of {subject.name}")


def _inputs(subject: Subject, batch: PackedBatch) -> dict[str, Any]:
    return batch.model_inputs(subject.model.device, subject.model.dtype)
