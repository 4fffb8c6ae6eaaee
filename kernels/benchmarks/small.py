"""Our kernel on small batches of every kind, against the reference: what compute-sanitizer watches.

python -m benchmarks.small [--few]
"""

from __future__ import annotations

import argparse
import os
from typing import Any

import torch

from hive_ds.kernels import AttentionLayout, finish_keys, hierarchical_attention
from hive_ds.kernels.testing import assert_as_exact, evaluate, padded_cache, plain_attention, random_inputs

BATCHES: dict[str, tuple[list[int], list[list[int]], list[list[int]]]] = {
    "no image": ([5, 17], [[], []], [[], []]),
    "image first, in the middle, last": ([9, 9, 9], [[20], [20], [20]], [[0], [4], [9]]),
    "two images, empty text": ([12, 0, 33], [[7, 18], [], [40]], [[0, 6], [], [1]]),
    "long text": ([300], [[70]], [[130]]),
}
"""Lengths, image lengths and offsets."""


def main() -> None:
    """Check every batch in every dtype and norm order; ``--few``: one dtype and norm order, for slow tools."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--few", action="store_true", help="one dtype and one norm order")
    few = parser.parse_args().few
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", 0) if cuda else torch.device("cpu")
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    backend = "triton" if cuda or interpreted else "auto"
    dtypes = [torch.bfloat16, torch.float32] if cuda else [torch.float32]
    norms = ["pre_rope", "post_rope", "none"] if cuda else ["pre_rope"]
    if few:
        dtypes, norms = dtypes[:1], norms[:1]
    for name, lists in BATCHES.items():
        if not cuda and name != "two images, empty text":
            continue  # the interpreter is slow, and tests/kernels has these layouts too
        layout = AttentionLayout.build(*lists, device=device)
        for dtype in dtypes:
            for qk_norm in norms:
                _check(layout, dtype, qk_norm, backend)
        print(f"{name}: agrees ({backend}, {device.type})", flush=True)
    _check_decoding(device, backend)
    print(f"decoding: agrees ({backend}, {device.type})", flush=True)


def _check(layout: AttentionLayout, dtype: torch.dtype, qk_norm: str, backend: str) -> None:
    inputs = random_inputs(layout, heads=6, groups=2, head_dim=32, qk_norm=qk_norm, rotate=True)
    found = evaluate(inputs, hierarchical_attention, dtype=dtype, backend=backend)
    exact = evaluate(inputs, hierarchical_attention, backend="reference")
    assert_as_exact(found, evaluate(inputs, plain_attention, dtype=dtype), exact, dtype)


def _check_decoding(device: torch.device, backend: str) -> None:
    """The last token of a whole pass, computed as a step against a padded cache."""
    lists = ([5, 17], [[20], [9]], [[0], [6]])
    inputs = random_inputs(
        AttentionLayout.build(*lists, device=device), heads=6, groups=2, head_dim=32, qk_norm="pre_rope", rotate=True
    )
    t: dict[str, Any] = {name: x.float() for name, x in (inputs.tensors | inputs.tables).items()}
    whole = hierarchical_attention(**t, layout=inputs.layout, qk_norm="pre_rope", backend="reference")
    rows = torch.tensor([4, 21], device=device)
    keys = finish_keys(t["k"], t["k_norm_weight"], 1e-6, "pre_rope", t["cos"], t["sin"])
    image_keys = finish_keys(t["image_k"], t["k_norm_weight"], 1e-6, "pre_rope", t["image_cos"], t["image_sin"])
    found = hierarchical_attention(
        t["q"][rows],
        padded_cache(keys, lists[0], 20),
        padded_cache(t["v"], lists[0], 20),
        image_keys,
        t["image_v"],
        AttentionLayout.build(*lists, query_lengths=[1, 1], device=device),
        q_norm_weight=t["q_norm_weight"],
        qk_norm="pre_rope",
        cos=t["cos"][rows],
        sin=t["sin"][rows],
        backend=backend,
    )
    assert isinstance(found, torch.Tensor)
    assert isinstance(whole, torch.Tensor)
    torch.testing.assert_close(found, whole[rows], atol=1e-5, rtol=1e-4)


if __name__ == "__main__":
    main()
