"""The tiny base models: any text encodes, losses are of answers alone, and what was trained is what is written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import SiglipVisionModel

from hive_ds.data.scenes_samples import caption_samples, text_samples
from hive_ds.quickstart import base_models
from hive_ds.quickstart.base_models import (
    LanguageModelSize,
    VisionEncoderSize,
    _batches,
    pretrain_language_model,
    pretrain_vision_encoder,
    save_folder,
    train_tokenizer,
)

TEXTS = list(text_samples(0, "text", 12))
TOKENIZER = train_tokenizer([turn.content for sample in TEXTS for turn in sample.turns], 400)
LossOf = Callable[[np.ndarray], torch.Tensor]
LANGUAGE = LanguageModelSize(layers=1, width=32, heads=2, kv_heads=1, mlp=32, steps=30, batch=4)
VISION = VisionEncoderSize(image=32, patch=16, blocks=1, width=32, heads=2, mlp=32, text_blocks=1, steps=2, batch=4)


def no_progress(step: int, steps: int, loss: float) -> None:
    pass


def test_any_text_encodes_and_turns_are_marked() -> None:
    text = "a red ring, größer: 漢字 🙂\n"
    assert TOKENIZER.decode(TOKENIZER(text).input_ids) == text
    assert len(TOKENIZER) <= 400
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    written = TOKENIZER.apply_chat_template(messages, tokenize=False)
    assert written == "<|user|>a<|end|><|assistant|>b<|end|>"
    prompt = TOKENIZER.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert prompt == "<|user|>a<|end|><|assistant|>"
    assert TOKENIZER.eos_token == "<|end|>"
    assert all(len(TOKENIZER(mark).input_ids) == 1 for mark in ("<|user|>", "<|assistant|>", "<|end|>", "<|pad|>"))


def test_an_epoch_holds_every_index_once_in_whole_batches() -> None:
    for count, batch, steps in ((10, 4, 2), (8, 4, 2), (3, 4, 1)):
        batches = _batches(count, batch, seed=0)
        first, second = ([next(batches) for _ in range(steps)] for _ in range(2))
        assert [len(one) for one in [*first, *second]] == [min(count, batch)] * (2 * steps)
        assert len(set(np.concatenate(first))) == steps * min(count, batch)
        assert not np.array_equal(np.concatenate(first), np.concatenate(second))


def test_the_language_model_learns_answers_and_padding_counts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    losses: list[LossOf] = []
    train = base_models._train
    monkeypatch.setattr(
        base_models, "_train", lambda model, loss_of, *of: (losses.append(loss_of), train(model, loss_of, *of))
    )
    said: list[float] = []
    model = pretrain_language_model(
        TEXTS, TOKENIZER, LANGUAGE, seed=0, progress=lambda step, steps, loss: said.append(loss)
    )
    assert len(said) == LANGUAGE.steps
    assert said[0] == pytest.approx(np.log(len(TOKENIZER)), rel=0.2)
    assert said[-1] < 0.7 * said[0]
    assert not model.training
    with torch.no_grad():
        rows = [
            base_models.encode_sample(one, TOKENIZER, template="chat", image_position="first", max_length=512)
            for one in TEXTS
        ]
        carry = [sum(label != -100 for label in row.labels[1:]) for row in rows]
        alone = [losses[0](np.array([index])).item() for index in range(4)]
        assert losses[0](np.arange(4)).item() == pytest.approx(np.average(alone, weights=carry[:4]), rel=1e-4)


def test_the_encoder_is_the_one_that_was_trained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On pictures beside their own captions."""
    trained: list[Any] = []
    train = base_models._train

    def spied(model: torch.nn.Module, loss_of: LossOf, *of: Any) -> None:
        trained.extend((model, loss_of))
        train(model, loss_of, *of)

    monkeypatch.setattr(base_models, "_train", spied)
    samples = list(caption_samples(0, "captions", 8, 32))
    images, captions = [sample.images[0] for sample in samples], [sample.turns[-1].content for sample in samples]
    encoder, processor = pretrain_vision_encoder(images, captions, TOKENIZER, VISION, seed=0, progress=no_progress)
    model, loss_of = trained
    save_folder(encoder, processor, tmp_path / "encoder")
    pixels = torch.stack([base_models._pixels(image, processor) for image in images])
    assert pixels.shape == (8, 3, 32, 32)
    ids = TOKENIZER(captions, padding="max_length", truncation=True, max_length=16, return_tensors="pt").input_ids
    some = [3, 0, 5]
    with torch.no_grad():
        expected = model(input_ids=ids[some], pixel_values=pixels[some], return_loss=True).loss
        torch.testing.assert_close(loss_of(np.array(some)), expected)
        found = SiglipVisionModel.from_pretrained(tmp_path / "encoder").eval()(pixels).pooler_output
        torch.testing.assert_close(found, model.vision_model(pixels).pooler_output)


def test_base_models_are_a_function_of_the_seed() -> None:
    images = [sample.images[0] for sample in caption_samples(0, "captions", 4, 32)]

    def weights(seed: int) -> torch.Tensor:
        short = replace(LANGUAGE, steps=2)
        torch.seed()
        language = pretrain_language_model(TEXTS[:4], TOKENIZER, short, seed=seed, progress=no_progress)
        torch.seed()
        vision, _ = pretrain_vision_encoder(
            images, ["a", "b", "c", "d"], TOKENIZER, VISION, seed=seed, progress=no_progress
        )
        return torch.stack([next(iter(model.parameters())).flatten()[:32].detach() for model in (language, vision)])

    first, again, other = weights(0), weights(0), weights(1)
    assert torch.equal(first, again)
    assert not torch.isclose(first, other).all(dim=1).any()
