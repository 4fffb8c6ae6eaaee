"""The encoder as a stock folder of transformers, read back by plain transformers."""

from __future__ import annotations

import torch

from hive_ds.export.formats import PICTURE, SHARD_SIZE, Job, Written
from hive_ds.export.parity import features_before, largest_difference, processed_pictures
from hive_ds.model.vision import vision_class


def write(job: Job) -> Written:
    """Write config and weights, in shards where they are large, and compare features in fp32."""
    job.encoder.save_pretrained(job.folder, max_shard_size=SHARD_SIZE)
    name = type(job.encoder).__name__
    return Written(name, _usage(job, name), _difference(job), "fp32")


def _usage(job: Job, name: str) -> str:
    block = job.blocks[-1]
    if "pixel_attention_mask" in job.processor.model_input_names:
        said = "pictures of few patches are padded, here without"
        taken = f'found.hidden_states[{block}][inputs["pixel_attention_mask"].bool()]  # (patches, width)'
    else:
        said = "class and register tokens stand first"
        taken = f"found.hidden_states[{block}]  # (1, tokens, width)"
    return (
        f"import torch\nfrom PIL import Image\nfrom transformers import AutoImageProcessor, {name}\n\n"
        f'encoder = {name}.from_pretrained("{job.name}").eval()\n'
        f'processor = AutoImageProcessor.from_pretrained("{job.name}")\n'
        f'inputs = processor({PICTURE}, return_tensors="pt")\n'
        "with torch.no_grad():\n    found = encoder(**inputs, output_hidden_states=True)\n"
        f"# The output of block {block}, the last one that the LLM saw; {said}.\n"
        f"features = {taken}"
    )


@torch.no_grad()
def _difference(job: Job) -> float:
    inputs = processed_pictures(job.processor)
    mask = inputs.get("pixel_attention_mask")
    expected = features_before(job.encoder.float(), job.blocks, **inputs)
    restored = vision_class(job.encoder.config).from_pretrained(job.folder, dtype=torch.float32).eval()
    hidden_states = restored(**inputs, output_hidden_states=True).hidden_states
    return largest_difference(
        [(features, patch_tokens(hidden_states[block], len(features), mask)) for block, features in expected.items()]
    )


def patch_tokens(hidden: torch.Tensor, patches: int, mask: torch.Tensor | None) -> torch.Tensor:
    """(I, P, D) -> (N, D): without padding or, where there is no mask, without leading class and register tokens."""
    if mask is not None:
        return hidden[mask.bool()]
    return hidden[:, hidden.shape[1] - patches // len(hidden) :].flatten(0, 1)
