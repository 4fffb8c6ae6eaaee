"""Weights from safetensors folders by name, strictly, and what a load did."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from hive_ds.errors import HiveError
from hive_ds.model.attention import HiveAttention
from hive_ds.model.cascaded import STOCK_NAMES
from hive_ds.model.identity import canonical_parts, open_weights, weight_files

TOWER = "vision_encoder."
"""Before the names of the vision tower in our models."""


@dataclass(frozen=True)
class LoadReport:
    """What a load did, by parameter name."""

    loaded: tuple[str, ...]
    copied: tuple[str, ...]
    """Set from another parameter of the model because the folder has none: image_k_proj, image_v_proj."""
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]

    def __str__(self) -> str:
        """One line of counts, with the names of what is not simply loaded."""
        parts = [f"loaded {len(self.loaded)}"]
        for label in ("copied", "missing", "unexpected"):
            names = getattr(self, label)
            parts.append(f"{label} {len(names)}" + (f" ({shortened(names)})" if names else ""))
        return "weights: " + ", ".join(parts)


def load_weights(model: nn.Module, folder: str | Path) -> LoadReport:
    """Load the safetensors of ``folder`` by name, strictly.

    A model with its own image projections takes them from k_proj and v_proj where the folder has none (stage 1's).

    Raises:
        HiveError: no weights in the folder, a name missing or unexpected, or a shape that differs.
    """
    loaded, unexpected = [], []
    with torch.no_grad():
        own = {
            name: tensor
            for own_name, whole in model.state_dict(keep_vars=True).items()
            for name, tensor in _canonical_parts(own_name, whole)
        }
        for file in weight_files(Path(folder)):
            with open_weights(file) as tensors:
                for saved_name in tensors.keys():  # noqa: SIM118 (not a dict)
                    for name, saved in _canonical_parts(saved_name, tensors.get_tensor(saved_name)):
                        if name not in own:
                            unexpected.append(name)
                            continue
                        _copy(own[name], saved, name, folder)
                        loaded.append(name)
    copied = _copy_missing_image_projections(model, set(loaded))
    have = {own[name].data_ptr() for name in (*loaded, *copied)}
    missing = sorted(name for name, tensor in own.items() if tensor.data_ptr() not in have)
    report = LoadReport(tuple(sorted(loaded)), copied, tuple(missing), tuple(sorted(unexpected)))
    if not loaded or missing or unexpected:
        raise HiveError(f"{folder} does not hold this model's weights; {report}")
    return report


def _canonical_parts(name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    """A tensor, or views of its parts, under names that hold for transformers 4, 5 and a stock Llava."""
    for ours, stock in STOCK_NAMES.items():
        if name.startswith(stock):
            name = ours + name.removeprefix(stock)
    if not name.startswith(TOWER):
        return [(name, tensor)]
    return [(TOWER + part, values) for part, values in canonical_parts(name, tensor)]


def _copy(parameter: Tensor, saved: Tensor, name: str, folder: str | Path) -> None:
    if parameter.shape != saved.shape:
        raise HiveError(
            f"{folder} holds another model: {name} has shape {tuple(saved.shape)}, expected {tuple(parameter.shape)}"
        )
    parameter.copy_(saved)


def own_image_attentions(model: nn.Module) -> dict[str, HiveAttention]:
    """Attention of the LLM layers that have projections of their own for image keys, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, HiveAttention) and hasattr(module, "image_k_proj")
    }


def _copy_missing_image_projections(model: nn.Module, loaded: set[str]) -> tuple[str, ...]:
    copied: list[str] = []
    for prefix, attention in own_image_attentions(model).items():
        names = [
            f"{prefix}.{child}.{parameter}"
            for child in ("image_k_proj", "image_v_proj")
            for parameter, _ in getattr(attention, child).named_parameters()
        ]
        if not loaded.intersection(names):
            attention.copy_image_projections()
            copied += names
    return tuple(copied)


def shortened(names: tuple[str, ...]) -> str:
    """The first four names, and how many more there are."""
    more = "" if len(names) <= 4 else f", and {len(names) - 4} more"
    return ", ".join(names[:4]) + more
