"""Batched answers equal those one by one; shuffled images leave no sample its own."""

from __future__ import annotations

import pytest
from scene_models import save_scene_model

from hive_ds.data.scenes_samples import question_samples
from hive_ds.data.schema import Sample, Turn
from hive_ds.errors import HiveError
from hive_ds.evaluation.generation import answer_samples, truth, with_shuffled_images

SAMPLES = list(question_samples(0, "questions", 7, 64))


def test_batches_answer_as_single_prompts_and_from_the_prompt_alone(tmp_path) -> None:
    model, processor = save_scene_model(tmp_path)
    together = answer_samples(model, processor, SAMPLES, template="chat", batch_size=3, max_new_tokens=5)
    alone = [answer_samples(model, processor, [s], template="chat", max_new_tokens=5)[0] for s in SAMPLES]
    assert together == alone
    assert len(set(together)) > 1  # a random model, but not a constant one
    unanswered = [Sample(s.id, (*s.turns[:-1], Turn("assistant", "other")), s.images) for s in SAMPLES]
    assert answer_samples(model, processor, unanswered, template="chat", max_new_tokens=5) == together


def test_answers_end_where_the_template_does_and_are_greedy(tmp_path) -> None:
    """Whatever the base LLM calls its end, and whatever penalties its own generation config holds."""
    model, processor = save_scene_model(tmp_path)
    before = answer_samples(model, processor, SAMPLES, template="chat", max_new_tokens=5)
    asked = {}

    def generate(**arguments):
        asked.update(arguments)
        return type(model).generate(model, **arguments)

    model.generation_config.repetition_penalty = 3.0
    closing = processor.tokenizer.eos_token_id
    processor.tokenizer.add_special_tokens({"eos_token": "<|endoftext|>"})
    model.generate = generate
    assert answer_samples(model, processor, SAMPLES, template="chat", max_new_tokens=5) == before
    assert asked["eos_token_id"] == [processor.tokenizer.eos_token_id, closing]


def test_a_tokenizer_without_padding_is_not_talked_about(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers says at each call what it pads with, on every rank, unless it is told."""
    model, processor = save_scene_model(tmp_path)
    before = answer_samples(model, processor, SAMPLES, template="chat", max_new_tokens=5)
    processor.tokenizer.pad_token = model.generation_config.pad_token_id = None
    said: list[str] = []
    monkeypatch.setattr("transformers.generation.utils.logger.warning", said.append)
    assert answer_samples(model, processor, SAMPLES, template="chat", max_new_tokens=5) == before
    assert said == []


def test_the_picture_counts(tmp_path) -> None:
    model, processor = save_scene_model(tmp_path)
    first = SAMPLES[0]
    over_others = [Sample(s.id, first.turns, s.images) for s in SAMPLES]
    answers = answer_samples(model, processor, over_others, template="chat", max_new_tokens=8)
    assert len(set(answers)) > 1


@pytest.mark.parametrize("seed", range(5))
def test_shuffling_moves_every_image(seed: int) -> None:
    shuffled = with_shuffled_images(SAMPLES, seed)
    assert [s.turns for s in shuffled] == [s.turns for s in SAMPLES]
    assert sorted(s.images for s in shuffled) == sorted(s.images for s in SAMPLES)
    assert all(new.images != old.images for new, old in zip(shuffled, SAMPLES, strict=True))
    assert shuffled == with_shuffled_images(SAMPLES, seed)


def test_wrong_input() -> None:
    with pytest.raises(HiveError, match="1 samples"):
        with_shuffled_images(SAMPLES[:1], 0)
    text = Sample("t", (Turn("user", "hm?"), Turn("assistant", "yes")))
    with pytest.raises(HiveError, match="unequal numbers"):
        with_shuffled_images([SAMPLES[0], text], 0)
    with pytest.raises(HiveError, match=r"'q'.*user"):
        truth(Sample("q", (Turn("user", "a"), Turn("assistant", "b"), Turn("user", "c"))))
