"""The language-modelling loss: an LLM's head and cross-entropy, fused on GPUs so that no logits are kept.

Liger-Kernel's fused linear cross-entropy makes the logits of some tokens at a time and turns them into gradients.
Axes: T supervised token, D model, V vocabulary.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import lru_cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hive_ds.constants import IGNORE_INDEX
from hive_ds.errors import HiveError
from hive_ds.kernels.tiles import INTERPRETED

FUSED = "liger"
LOGITS_BYTES = 2**28
"""Of the logits that the fused loss makes at a time; about, for Liger-Kernel rounds pieces up to powers of 2."""
_CHANGES_LOGITS = ("final_logit_softcapping", "logits_scaling", "logit_scale")
"""Keys of an LLM's config under which its logits are more than a product with the head."""


class LanguageLoss(nn.Module):
    """Cross-entropy of next tokens, summed. Holds no weights: it reads those of the LLM's head.

    A module of its own, so that ZeRO-3 gathers the head for it alone, forward and backward.
    """

    def __init__(self, language_model: Any) -> None:
        super().__init__()
        self.backend = "auto"
        self._head: Callable[[], Any] = language_model.get_output_embeddings  # a child would be saved twice
        self._obstacle = _obstacle(language_model)

    def choose(self, device: torch.device) -> tuple[str, str]:
        """Which loss runs on ``device``, ``liger`` or ``plain``, and why.

        Raises:
            HiveError: the fused one is asked for by name and cannot run.
        """
        if self.backend == "plain":
            return "plain", "asked for"
        if self.backend == "auto" and device.type != "cuda":
            return "plain", f"the device is {device.type}"
        refusal = self._obstacle or _missing() or _no_gpu(device)
        if self.backend == "auto":
            return ("plain", refusal) if refusal else (FUSED, "a GPU")
        if refusal:
            raise HiveError(f"model.language_loss is {FUSED!r}, but {refusal}")
        return FUSED, "asked for"

    def external_parameters(self) -> list[nn.Parameter]:
        """Parameters that `forward` reads without calling the head (ZeRO-3 must know)."""
        if self.backend == "plain" or (self.backend == "auto" and not torch.cuda.is_available()):
            return []
        head = self._head()
        return [parameter for parameter in (head.weight, head.bias) if parameter is not None]

    def is_fused(self, device: torch.device) -> bool:
        """Whether `forward` there takes hidden states past the head."""
        return self.choose(device)[0] == FUSED

    def forward(self, hidden_TD: Tensor, targets_T: Tensor) -> Tensor:
        """Sum over all tokens, fp32; a finite zero, with zero gradients, if there is none."""
        head = self._head()
        if not self.is_fused(hidden_TD.device):
            return sum_of_cross_entropy(head(hidden_TD), targets_T)
        if not len(targets_T):
            return sum_of_cross_entropy(F.linear(hidden_TD, head.weight, head.bias), targets_T)
        return _fused(hidden_TD, head.weight, targets_T, head.bias)


def _fused(hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, bias_V: Tensor | None) -> Tensor:
    from liger_kernel.ops import LigerFusedLinearCrossEntropyFunction

    # The logits of a piece are as large as so many copies of the hidden states. With one, Liger-Kernel's default, 3,700
    # tokens of 1,152 numbers and a vocabulary of 32,000 are 15 pieces, each of several launches.
    copies = max(1, LOGITS_BYTES // hidden_TD.nbytes)
    # By place: weights of classes, what is ignored, factor of the z-loss, smoothing, reduction, cap of logits, whether
    # to return the z-loss, dtype in which the gradient of a head is added up (unrounded), scaling by token, whether to
    # return accuracy and tokens, implementation and its mode (the default ones).
    loss, *_ = LigerFusedLinearCrossEntropyFunction.apply(
        *(hidden_TD, weight_VD, targets_T, bias_V, None, IGNORE_INDEX, 0.0, 0.0, "sum", None, False, torch.float32),
        *(False, False, False, None, None, copies),
    )
    return cast(Tensor, loss)


def sum_of_cross_entropy(logits_TV: Tensor, targets_T: Tensor) -> Tensor:
    """Cross-entropy summed over all tokens, in fp32."""
    return F.cross_entropy(logits_TV.float(), targets_T, reduction="sum")


def describe_loss(loss: LanguageLoss, device: torch.device) -> str:
    """One line for the start of a run.

    Raises:
        HiveError: what the recipe asks for cannot run.
    """
    name, reason = loss.choose(device)
    return f"language-modelling loss: {name} ({reason})"


@lru_cache
def _missing() -> str | None:
    """Why Liger-Kernel cannot serve; None if it can."""
    if importlib.util.find_spec("liger_kernel") is None:
        return "Liger-Kernel is not installed; expected pip install 'hive-ds[liger]', or 'plain'"
    try:
        importlib.import_module("liger_kernel.ops")
    except Exception as error:  # whatever a version of it does not find in torch, Triton or transformers
        return f"Liger-Kernel does not load here: {error}"
    return None


def _no_gpu(device: torch.device) -> str | None:
    """Why Triton, which Liger-Kernel is written in, cannot serve on ``device``; None if it can."""
    if device.type == "cuda" or INTERPRETED:
        return None
    return f"the device is {device.type}; expected a GPU, or TRITON_INTERPRET=1 set before Python starts"


def _obstacle(language_model: Any) -> str | None:
    """What keeps the head of this LLM from being fused; None if nothing does."""
    changed = [name for name in _CHANGES_LOGITS if getattr(language_model.config, name, None) not in (None, 1, 1.0)]
    if changed:
        return f"the language model changes its logits by {changed[0]}"
    if not isinstance(language_model.get_output_embeddings(), nn.Linear):
        return "the language model's head is not a linear layer"
    return None
