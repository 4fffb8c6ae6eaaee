"""What becomes of an encoder's end, which no gradient reached: the blocks after the last routed one, norm and head."""

from __future__ import annotations

import torch
from transformers import AutoConfig, PreTrainedModel

from hive_ds.errors import require_one_of
from hive_ds.export.source import Tower
from hive_ds.model.vision import vision_class

TAILS = ("keep", "cut")
HEAD_SWITCHES = {
    "siglip_vision_model": "vision_use_head",
    "siglip2_vision_model": "vision_use_head",
    "aimv2_vision_model": "use_head",
}
"""Of a config, where the pooling head can be left out."""
FINAL_NORMS = ("post_layernorm", "layernorm", "rms_norm", "norm")


def with_tail(tower: Tower, tail: str) -> PreTrainedModel:
    """The encoder as it is (``keep``), or without its untrained end (``cut``).

    A cut encoder ends with the last routed block. Its final norm is a new one (ones and zeros), as in the paper's
    probes: the old one fits the statistics of a block that is gone. The pooling head is left out where the config has a
    switch for it (SigLIP, SigLIP2, AIMv2); elsewhere the pooled output is the normed CLS token and has no weights.

    Raises:
        HiveError: ``tail`` is neither.
    """
    require_one_of("tail", tail, TAILS)
    return tower.encoder if tail == "keep" else _cut(tower.encoder, tower.last_block)


def _cut(encoder: PreTrainedModel, last_block: int) -> PreTrainedModel:
    values = encoder.config.to_dict()
    for derived in ("stage_names", "out_features", "out_indices"):  # of DINOv2's config: they count the blocks
        values.pop(derived, None)
    values["num_hidden_layers"] = last_block
    if encoder.config.model_type in HEAD_SWITCHES:
        values[HEAD_SWITCHES[encoder.config.model_type]] = False
    config = AutoConfig.for_model(**values)
    shorter = vision_class(config)._from_config(config)
    whole = encoder.state_dict()
    state = {name: _fresh(name, whole[name]) for name in shorter.state_dict()}
    shorter.load_state_dict(state, assign=True)
    return shorter.eval()


def _fresh(name: str, tensor: torch.Tensor) -> torch.Tensor:
    module, _, kind = name.removeprefix("vision_model.").rpartition(".")
    if module not in FINAL_NORMS:
        return tensor
    return torch.ones_like(tensor) if kind == "weight" else torch.zeros_like(tensor)


def describe_tail(tower: Tower, tail: str) -> str:
    """What the model card says about it."""
    blocks = tower.encoder.config.num_hidden_layers
    first = tower.last_block + 1
    untrained = (
        "No block" if first > blocks else f"Block {blocks}" if first == blocks else f"Blocks {first} to {blocks}"
    )
    if tail == "cut":
        return (
            f"{untrained} after the last routed one: cut. The final norm is new (weight 1, bias 0; it "
            "was never trained), as in the paper's probes, and the pooling head is left out where there was one."
        )
    if first > blocks:
        return "Every block was trained. The final norm and the pooling head were not: no gradient reaches them."
    return (
        f"{untrained}, the final norm and the pooling head come after the last routed block: no gradient reached them. "
        "They are kept here as they were before training, and were never fitted to the trained ones. Take the output "
        f"of block {tower.last_block}, as the lines below do, where in doubt."
    )
