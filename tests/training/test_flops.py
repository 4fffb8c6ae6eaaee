"""The closed-form FLOPs of a batch against PyTorch's own count of what ran."""

from __future__ import annotations

import pytest
import torch
from stage_helpers import CONFIG, draw_sample, make_model, pack
from torch.utils.flop_counter import FlopCounterMode

from hive_ds.stages import hive_groups, stage_by_number
from hive_ds.training.flops import FlopCounter
from hive_ds.training.groups import plan_stage
from hive_ds.training.loop import batch_size


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("tied", [True, False])
def test_matrix_products_are_counted(stage: int, tied: bool) -> None:
    model = make_model(stage_by_number(stage), text_changes={"tie_word_embeddings": tied})
    plan = plan_stage(
        model, stage_by_number(stage), hive_groups(model.routes.blocks_by_layer, model.last_vision_block), CONFIG
    )
    batch = pack([draw_sample(1, images=1), draw_sample(2, images=2), draw_sample(5, images=0)])
    with FlopCounterMode(display=False) as ran:
        model(**batch.model_inputs("cpu", torch.float32)).loss.backward()
    counts = ran.get_flop_counts()["Global"]
    products = sum(count for op, count in counts.items() if "attention" not in str(op))
    counter, size = FlopCounter(model, plan), batch_size(batch, patch_size=8)
    assert counter.count(size) - counter.attention(size) == products
