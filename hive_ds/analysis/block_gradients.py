"""Gradients of the loss at the outputs of vision encoder blocks: where in a picture, and how deep, the loss reaches.

Only patches count; CLS and register tokens are left out. Axes: N patch of all images, D width of the encoder.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hive_ds.model.attention_backends import TrainedModel
from hive_ds.model.positions import Grid
from hive_ds.model.vision import (
    patch_grids,
    patch_rows,
    patch_tokens,
    run_blocks,
    running_blocks,
    tokens_before_patches,
    vision_blocks,
)


@dataclass(frozen=True)
class BlockGradients:
    """Gradients of one loss.

    Attributes:
        loss: whose gradient it is, nats.
        by_block: block number, from 1 -> (N, D) gradient at its output; no entry for a block that the loss does not
            reach.
        grids: (rows, columns) of each image; N is the sum of their products.
    """

    loss: float
    by_block: dict[int, Tensor]
    grids: list[Grid]

    def norms(self) -> dict[int, float]:
        """L2 norm over all patches and channels, by block."""
        return {block: float(torch.linalg.vector_norm(found.float())) for block, found in self.by_block.items()}

    def on_patches(self, image: int) -> dict[int, Tensor]:
        """(rows, columns) L2 norm over channels at each patch of one image, on the CPU, by block."""
        sizes = [rows * columns for rows, columns in self.grids]
        return {
            block: found.float().norm(dim=1).split(sizes)[image].unflatten(0, self.grids[image]).cpu()
            for block, found in self.by_block.items()
        }


def block_gradients(model: TrainedModel, inputs: Mapping[str, Any]) -> BlockGradients:
    """Run forward and backward once and return the gradients; no parameter gets one, whatever trains.

    Args:
        model: in eval mode, so that nothing is drawn at random and nothing recomputed.
        inputs: arguments of its forward, with labels and images, as of `hive_ds.data.batch.PackedBatch.model_inputs`.
    """
    pixels = inputs["pixel_values"].detach().requires_grad_()  # a frozen encoder records nothing without it
    with torch.enable_grad(), _block_outputs(model) as outputs:
        loss = model(**{**inputs, "pixel_values": pixels}).loss
    found = torch.autograd.grad(loss, list(outputs.values()), allow_unused=True)
    config, shapes = model.config.vision_config, inputs.get("spatial_shapes")
    grids = patch_grids(config, pixels, shapes)
    rows_N = None if shapes is None else patch_rows(grids, pixels.shape[1], pixels.device)
    by_block = {
        block: patch_tokens(config, gradient, rows_N)
        for block, gradient in zip(outputs, found, strict=True)
        if gradient is not None
    }
    return BlockGradients(loss.item(), by_block, grids)


@contextmanager
def watched_gradients(model: TrainedModel) -> Iterator[dict[int, Tensor]]:
    """Squared L2 norm of the gradient at each block's output, summed over the backward passes inside.

    The passes are the caller's own; nothing is computed for it but the norms. A block without gradient (frozen, or
    after the last that is needed) has no entry.
    """
    squares: dict[int, Tensor] = {}
    first = tokens_before_patches(model.config.vision_config)

    def add(block: int, gradient: Tensor) -> None:
        square = gradient[:, first:].float().square().sum()
        squares[block] = squares[block] + square if block in squares else square

    def watch(block: int, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(partial(add, block))

    with _hooked_blocks(model, watch):
        yield squares


@contextmanager
def _block_outputs(model: TrainedModel) -> Iterator[dict[int, Tensor]]:
    """Outputs (I, P, D) of the blocks that run inside, by number."""
    outputs: dict[int, Tensor] = {}
    with _hooked_blocks(model, outputs.__setitem__):
        yield outputs


@contextmanager
def _hooked_blocks(model: TrainedModel, see: Any) -> Iterator[None]:
    """Call ``see(number, output)`` whenever a block has run inside."""

    def hook(block: int, module: nn.Module, arguments: Any, output: Any) -> None:
        see(block, output[0] if isinstance(output, tuple) else output)

    with ExitStack() as stack:
        # One after the other: a hook inside of a run that is compiled would compile it anew.
        stack.enter_context(running_blocks(model.vision_encoder, run_blocks))
        for number, block in enumerate(vision_blocks(model.vision_encoder), start=1):
            stack.callback(block.register_forward_hook(partial(hook, number)).remove)
        yield
