"""Questions during training: ranks of ZeRO-3 answer as one process with the saved weights does."""

from __future__ import annotations

import pytest
from tiny_run import TinyRun

from hive_ds.analysis.gradient_pictures import gradient_maps
from hive_ds.analysis.samples import Subject
from hive_ds.config import DataConfig
from hive_ds.data.mds import read_mds
from hive_ds.errors import HiveError
from hive_ds.evaluation.generation import answer_samples
from hive_ds.evaluation.scoring import accuracy
from hive_ds.model.loading import load_any
from hive_ds.processing import HiveProcessor
from hive_ds.training.distributed import World
from hive_ds.training.maps import SampleMaps
from hive_ds.training.questions import Questions


def test_ranks_answer_as_one_process_with_the_saved_weights(tiny: TinyRun) -> None:
    """Five questions on two ranks, whose answers end at different lengths."""
    values = {
        "data.train": tiny.root / "chat",
        "data.template": "chat",
        "data.validation": "null",
        "data.text_validation": "null",
        "data.questions": tiny.root / "questions",
        "training.validation_interval": 1,
        "training.maps_interval": 2,
        "stages.connector_pretraining.steps": 2,
    }
    tiny.train_forked(1, "asked", *(word for key, value in values.items() for word in ("--set", f"{key}={value}")))
    asked = tiny.metrics("asked", 1, "answers")
    assert [(line["step"], line["questions"]) for line in asked] == [(1, 5), (2, 5)]
    folder, samples = tiny.root / "asked" / "stage1" / "model", read_mds(tiny.root / "questions")
    model, processor = load_any(folder), HiveProcessor.from_pretrained(folder)
    alone = answer_samples(model, processor, samples, template="chat", batch_size=1)
    truths = [sample.turns[-1].content for sample in samples]
    assert len(set(alone)) > 1
    assert asked[-1]["examples"] == [
        {"id": sample.id, "answer": answer, "truth": true}
        for sample, answer, true in zip(samples, alone, truths, strict=True)
    ]
    assert asked[-1]["share"] == accuracy(zip(alone, truths, strict=True)).value
    expect_maps(tiny, Subject("alone", model, processor, "chat"))
    with pytest.raises(HiveError, match=r"sample 's\d+' has no image"):
        Questions.load(DataConfig(train="train", questions=str(tiny.root / "text")), processor, 2, World())
    assert Questions.load(DataConfig(train="train"), processor, 2, World()) is None


def expect_maps(tiny: TinyRun, subject: Subject) -> None:
    """Of the second step: norms of the first sample with the saved weights, and its pictures."""
    (line,) = tiny.metrics("asked", 1, "maps")
    sample = read_mds(tiny.root / "questions")[0]
    alone = gradient_maps(subject, sample).gradients.norms()
    assert (line["step"], line["sample_id"], line["block_grad_norms"]) == (2, sample.id, {})  # its encoder is frozen
    assert line["sample_grad_norms"] == {str(block): pytest.approx(norm, rel=1e-4) for block, norm in alone.items()}
    names = {path.name for path in (tiny.root / "asked" / "stage1" / "maps").iterdir()}
    assert names == {"step-000002-attention.png", "step-000002-gradients.png"}


def test_maps_need_a_held_out_sample(tiny: TinyRun) -> None:
    processor = HiveProcessor.from_base_models(tiny.root / "encoder", tiny.root / "language_model")
    nothing, folder = DataConfig(train="train"), tiny.root / "maps"
    assert SampleMaps.load(folder, nothing, processor, 0) is None
    with pytest.raises(HiveError, match=r"maps_interval is 5, but data\.validation and data\.questions are null"):
        SampleMaps.load(folder, nothing, processor, 5)
    with pytest.raises(HiveError, match="text: holds no sample with one image"):
        SampleMaps.load(folder, DataConfig(train="train", validation=str(tiny.root / "text")), processor, 5)
