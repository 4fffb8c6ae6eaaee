"""A saved cascaded model is a folder for stock transformers: `AutoProcessor` and `LlavaForConditionalGeneration`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scene_models import save_cascaded_scene_model
from transformers import AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor

from hive_ds.data.scenes_samples import question_samples
from hive_ds.evaluation.generation import answer_samples
from hive_ds.model.loading import load_any
from hive_ds.processing import HiveProcessor

QUESTIONS = ("<image>what colour is the circle?", "is it red?", "<image>what is left of <image>?")
SIZES = ((90, 40), (64, 64), (30, 77))
"""Width and height of the three pictures."""


def pictures() -> list[Image.Image]:
    drawn = np.random.default_rng(0)
    return [Image.fromarray(drawn.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in SIZES]


@pytest.mark.parametrize("aspect", ["square", "pad"])
@pytest.mark.parametrize("family", ["siglip", "clip"])
def test_stock_transformers_answers_alike(family: str, aspect: str, tmp_path: Path) -> None:
    """The same prompts and pictures, a wide and a tall one among them, give the same tokens there and here."""
    save_cascaded_scene_model(tmp_path, family, aspect)
    model, processor = load_any(tmp_path), HiveProcessor.from_pretrained(tmp_path)
    processor.save_pretrained(tmp_path / "again")
    config = (tmp_path / "processor_config.json").read_text()
    assert (tmp_path / "again" / "processor_config.json").read_text() == config
    prompts = [processor.apply_chat_template([{"role": "user", "content": question}]) for question in QUESTIONS]
    options = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": processor.tokenizer.pad_token_id}
    inputs = processor(prompts, pictures())
    ours = model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
    assert len({tuple(row.tolist()) for row in ours}) > 1

    stock_processor = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(stock_processor, LlavaProcessor)
    stock = LlavaForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32).eval()
    stock_inputs = stock_processor(
        images=pictures(), text=prompts, padding=True, padding_side="left", return_tensors="pt"
    )
    torch.testing.assert_close(stock_inputs["pixel_values"], inputs["pixel_values"], rtol=0, atol=1e-5)
    theirs = stock.generate(**stock_inputs, **options)[:, stock_inputs["input_ids"].shape[1] :]
    assert torch.equal(theirs, ours)


def test_batches_answer_as_single_prompts(tmp_path: Path) -> None:
    model, processor = save_cascaded_scene_model(tmp_path)
    samples = list(question_samples(0, "questions", 5, 64))
    together = answer_samples(model, processor, samples, template="chat", batch_size=3, max_new_tokens=5)
    alone = [answer_samples(model, processor, [one], template="chat", max_new_tokens=5)[0] for one in samples]
    assert together == alone
    assert len(set(together)) > 1
