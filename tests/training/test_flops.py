"""The closed-form FLOPs of a batch against PyTorch's own count of what ran."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from stage_helpers import CONFIG, draw_sample, make_cascaded, make_model, pack
from torch.utils.flop_counter import FlopCounterMode

from hive_ds.stages import stage_by_number
from hive_ds.training import flops
from hive_ds.training.flops import BatchSize, FlopCounter, warn_of_slow_bf16
from hive_ds.training.groups import groups_of, plan_stage
from hive_ds.training.step_sums import batch_size

HIVE = [("hive", stage) for stage in (1, 2, 3)]
CASCADED = [("cascaded", stage) for stage in (1, 2, 3, 4, 5)]


@pytest.mark.parametrize(("kind", "stage"), HIVE + CASCADED)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("images", [(1, 2, 0), (0, 0, 0)])
def test_matrix_products_are_counted(kind: str, stage: int, tied: bool, images: tuple[int, ...]) -> None:
    described = stage_by_number(stage, kind)
    make = make_cascaded if kind == "cascaded" else partial(make_model, described)
    model = make(text_changes={"tie_word_embeddings": tied})
    plan = plan_stage(model, described, groups_of(model), CONFIG)
    batch = pack([draw_sample(seed, images=count) for seed, count in zip((1, 2, 5), images, strict=True)])
    with FlopCounterMode(display=False) as ran:
        model(**batch.model_inputs("cpu", torch.float32)).loss.backward()
    counts = ran.get_flop_counts()["Global"]
    products = sum(count for op, count in counts.items() if "attention" not in str(op))
    size = replace(batch_size(batch, patch_size=8), text_pairs=0, image_pairs=0, encoder_pairs=0, sequence_pairs=0)
    # transformers makes the angles of the LLM's rotary positions by a matrix product, which is none of the model's.
    angles = model.config.text_config.head_dim * size.sequence_tokens if kind == "cascaded" else 0
    assert FlopCounter(model, plan).count(size) == products - angles


def test_pairs_of_text_and_image_in_one_sequence() -> None:
    """Two samples of 3 and 2 tokens; an image of 4 patches before the second token, and one that no token sees."""
    size = BatchSize.of([3, 2], [[1], [2]], 4, [4, 9])
    assert (size.sequence_tokens, size.sequence_pairs) == (3 + 4 + 2, 7 * 8 // 2 + 2 * 3 // 2)
    assert (size.text_pairs, size.image_pairs, size.patches) == (6 + 3, 2 * 4, 13)


def test_a_cpu_that_is_slow_in_bf16_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = {torch.float32: 80e9, torch.bfloat16: 1.25e9}
    monkeypatch.setattr(flops, "matmul_rate", lambda device, dtype: rates[dtype])
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    told = warn_of_slow_bf16(cpu, torch.bfloat16, rates[torch.bfloat16])
    assert told is not None
    assert "64 times as fast in fp32 (80 GFLOP/s) as in bf16 (1.2)" in told
    assert warn_of_slow_bf16(cpu, torch.bfloat16, 40e9) is None
    assert warn_of_slow_bf16(cpu, torch.float32, 1e9) is None
    assert warn_of_slow_bf16(cuda, torch.bfloat16, 1e9) is None
