"""Linear centred kernel alignment of two sets of features, summed up batch by batch.

Source: Kornblith et al., Similarity of Neural Network Representations Revisited, arXiv 1905.00414, equation 6.
Axes: N example, D and E widths.
"""

from __future__ import annotations

import torch
from torch import Tensor


class LinearCka:
    """Similarity in [0, 1] that no rotation, shift or scale of either side changes.

    It holds three matrices of width x width in fp64, whatever the number of examples. With fewer examples than channels
    it is biased upwards.
    """

    def __init__(self) -> None:
        self._count = 0
        self._sums: list[Tensor] = []
        """Of x (D), y (E), and of the products x x (D, D), y y (E, E), x y (D, E)."""

    def add(self, x_ND: Tensor, y_NE: Tensor) -> None:
        """Take in features of the same examples on both sides."""
        x, y = x_ND.double(), y_NE.double()
        new = [x.sum(0), y.sum(0), x.T @ x, y.T @ y, x.T @ y]
        self._sums = [mine + one for mine, one in zip(self._sums, new, strict=True)] if self._sums else new
        self._count += len(x)

    def value(self) -> float:
        """Of all examples so far, one at least; NaN where one side does not vary."""
        x, y, *products = self._sums
        sides = ((x, x), (y, y), (x, y))
        xx, yy, xy = (product - torch.outer(*pair) / self._count for product, pair in zip(products, sides, strict=True))
        return float(xy.square().sum() / (xx.norm() * yy.norm()))
