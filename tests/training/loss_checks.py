"""Checks of the fused language-modelling loss under ZeRO-3, beside the plain one; `test_engine` runs them."""

from __future__ import annotations

from typing import Any

import torch
from cascaded_checks import cascaded_stage
from stage_helpers import config_for, make_cascaded, make_model, make_trainee, run_step, step_batches

from hive_ds.constants import IGNORE_INDEX
from hive_ds.stages import stage_by_number

IMAGES = (1, 0, 2, 1)
UNSUPERVISED = 1
"""Step in which the last rank has nothing to learn from."""


def losses_with(ranks: Any, kind: str, backend: str, tied: bool) -> list[list[float]]:
    """Loss and gradient norms of three steps of the stage that trains most: HIVE's third, or 5 with the head."""
    stage = stage_by_number(3) if kind == "hive" else cascaded_stage(5)
    changes = {"text_changes": {"tie_word_embeddings": tied}}
    model = make_model(stage, **changes) if kind == "hive" else make_cascaded(**changes)
    model.language_loss.backend = backend
    trainee = make_trainee(ranks, stage=stage, model=model, config=config_for(1))
    rows = []
    for step in range(3):
        batches = step_batches(ranks, step, 1, IMAGES)
        if step == UNSUPERVISED and ranks.world.rank == ranks.world.size - 1:
            for batch in batches:
                batch.labels.fill_(IGNORE_INDEX)
        loss, report = run_step(ranks, trainee, batches)
        rows.append([loss, *report.grad_norms.values()])
    trainee.engine.close()
    return rows


def check_fused_loss(ranks: Any) -> None:
    """Row 26: the fused loss reads the head outside of its module, gathered; tied to the embeddings, and not."""
    for kind in ("hive", "cascaded"):
        for tied in (True, False):
            plain, fused = (losses_with(ranks, kind, backend, tied) for backend in ("plain", "liger"))
            torch.testing.assert_close(torch.tensor(fused), torch.tensor(plain), rtol=1e-5, atol=1e-5)
