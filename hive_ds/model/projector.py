"""Projectors: features of one vision block to the width of the LLM."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Projector(nn.Module):
    """LayerNorm, Linear, GELU, Linear; one per route (arXiv 2604.00086)."""

    def __init__(self, vision_size: int, language_size: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(vision_size, eps=1e-5)
        self.fc1 = nn.Linear(vision_size, language_size)
        self.fc2 = nn.Linear(language_size, language_size)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-uniform weights, zero biases, identity norm."""
        self.norm.reset_parameters()
        for linear in (self.fc1, self.fc2):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, features: Tensor) -> Tensor:
        """(N, D_vision) -> (N, D)."""
        return self.fc2(F.gelu(self.fc1(self.norm(features))))


class MlpProjector(nn.Module):
    """Linear, GELU, Linear, as LLaVA 1.5's."""

    def __init__(self, vision_size: int, language_size: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(vision_size, language_size)
        self.linear_2 = nn.Linear(language_size, language_size)

    def forward(self, features: Tensor) -> Tensor:
        """(N, D_vision) -> (N, D)."""
        return self.linear_2(F.gelu(self.linear_1(features)))


def projector_name(block: int, layer: int) -> str:
    """Key of a route's projector in the model."""
    return f"block{block}_to_layer{layer}"
