"""The linear head: multinomial logistic regression, fitted to its one optimum.

The loss is convex, so there is no learning rate, schedule or number of epochs that could favour one encoder, and no
start or order that a seed would change. What is left to choose, the weight of the L2 term, is chosen on a part of
the training images that the seed holds out. Features are shifted and scaled to mean 0 and variance 1 first, because
their scale differs from block to block by orders of magnitude. Axes: I image, D width, C class.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from hive_ds.evaluation.probes.data import hold_out
from hive_ds.evaluation.probes.settings import LinearSettings

ROWS = 16384
"""Images whose logits are in memory at once."""
GRID = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
"""Weights of the L2 term to choose from; each fit starts from the one before."""
HELD_OUT = 0.2
"""Share of the training images on which it is chosen."""
GRADIENT = 1e-5
"""Largest entry of the gradient at which the fit ends."""


@dataclass(frozen=True)
class LinearFit:
    """``weight`` (C, D) and ``bias`` (C,) float64, on the features' device, and how the fit ended."""

    weight: Tensor
    bias: Tensor
    gradient: float
    """Largest entry of the loss's gradient."""
    steps: int

    def logits(self, features: Tensor) -> Tensor:
        """(I, C), in the features' dtype."""
        return features @ self.weight.T.to(features.dtype) + self.bias.to(features.dtype)


def fit_logistic(
    features: Tensor, labels: Tensor, num_classes: int, l2: float, *, max_steps: int, start: LinearFit | None = None
) -> LinearFit:
    """Minimise mean cross-entropy + l2 / 2 * |weight|^2; the bias is free.

    scikit-learn's ``LogisticRegression(C=1 / (l2 * I))`` has the same optimum. Sums over images are float64.

    Args:
        features: (I, D) float32 or float64.
        labels: (I,) int64, on the same device.
        num_classes: C.
        l2: above 0.
        max_steps: of L-BFGS.
        start: another fit to start from.
    """
    size, width = features.shape

    def loss_and_gradient(flat: np.ndarray) -> tuple[float, np.ndarray]:
        fit = _unpack(flat, num_classes, width, features.device)
        loss = l2 / 2 * fit.weight.square().sum()
        weight, bias = l2 * fit.weight, torch.zeros_like(fit.bias)
        for first in range(0, size, ROWS):
            rows, truth = features[first : first + ROWS], labels[first : first + ROWS, None]
            log_shares = fit.logits(rows).log_softmax(-1)
            loss -= log_shares.gather(1, truth).double().sum() / size
            residual = log_shares.exp()
            residual.scatter_add_(1, truth, -torch.ones_like(truth, dtype=residual.dtype))
            weight += (residual.T @ rows).double() / size
            bias += residual.double().sum(0) / size
        return float(loss), torch.cat([weight.flatten(), bias]).cpu().numpy()

    first = np.zeros(num_classes * (width + 1))
    if start is not None:
        first = torch.cat([start.weight.flatten(), start.bias]).cpu().numpy()
    options = {"maxiter": max_steps, "maxfun": 2 * max_steps, "gtol": GRADIENT, "ftol": 0.0}
    result = minimize(loss_and_gradient, first, jac=True, method="L-BFGS-B", options=options)
    fit = _unpack(result.x, num_classes, width, features.device)
    return LinearFit(fit.weight, fit.bias, float(np.abs(result.jac).max()), int(result.nit))


def predict_linear(
    train: Tensor, train_labels: Tensor, test: Tensor, num_classes: int, settings: LinearSettings, seed: int
) -> tuple[Tensor, dict]:
    """(I,) classes of ``test``, and what the fit came to: ``l2``, ``steps`` and ``gradient``."""
    mean, std = train.mean(0), train.std(0, correction=0)
    std = torch.where(std > 0, std, 1.0)
    train, test = (train - mean) / std, (test - mean) / std
    l2, start = (settings.l2, None) if settings.l2 else _choose_l2(train, train_labels, num_classes, settings, seed)
    fit = fit_logistic(train, train_labels, num_classes, l2, max_steps=settings.max_steps, start=start)
    return fit.logits(test).argmax(-1), {"l2": l2, "steps": fit.steps, "gradient": fit.gradient}


def _choose_l2(
    train: Tensor, labels: Tensor, num_classes: int, settings: LinearSettings, seed: int
) -> tuple[float, LinearFit]:
    """The value of the grid with the best accuracy on the held-out images, of equal ones the largest; and its fit."""
    kept, held = (torch.from_numpy(rows).to(train.device) for rows in hold_out(labels.cpu().numpy(), HELD_OUT, seed))
    best: tuple[float, LinearFit] | None = None
    best_right, fit = -1, None
    for l2 in GRID:
        fit = fit_logistic(train[kept], labels[kept], num_classes, l2, max_steps=settings.max_steps, start=fit)
        right = int((fit.logits(train[held]).argmax(-1) == labels[held]).sum())
        if right > best_right:
            best, best_right = (l2, fit), right
    assert best is not None
    return best


def _unpack(flat: np.ndarray, num_classes: int, width: int, device: torch.device) -> LinearFit:
    values = torch.from_numpy(flat.copy()).to(device)
    return LinearFit(values[: num_classes * width].view(num_classes, width), values[num_classes * width :], 0.0, 0)
