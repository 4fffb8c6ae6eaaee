"""Answers by generation: batches of prompts through a model, and the check that it looks at the picture."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from hive_ds.data.chat import end_token_ids, padding_id
from hive_ds.data.schema import Sample
from hive_ds.data.text import render_prompt
from hive_ds.errors import HiveError
from hive_ds.model.attention_backends import TrainedModel
from hive_ds.processing import HiveProcessor

GREEDY = {"do_sample": False, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
"""The likeliest token each time, whatever the base LLM's own defaults add; a penalty would count other tokens in HIVE
models, whose prompts are tokens, than in LLaVA-style ones, whose are embeddings."""


def answer_samples(
    model: TrainedModel,
    processor: HiveProcessor,
    samples: Sequence[Sample],
    *,
    template: str,
    batch_size: int = 32,
    max_new_tokens: int = 16,
    synced: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Greedy answers to the last question of every sample, in order.

    A sample's own answer, if its last turn is one, is left out of the prompt.

    Args:
        model: in eval mode.
        processor: the one it was trained with.
        samples: conversations.
        template: ``plain`` or ``chat``, as in `DataConfig`.
        batch_size: prompts generated together; changes no answer but for rounding.
        max_new_tokens: longest answer.
        synced: every rank goes on until all have finished, which ZeRO-3 needs; each must bring equally many batches.
        progress: called with (answered, all) after every batch.
    """
    answers: list[str] = []
    for start in range(0, len(samples), batch_size):
        batch = samples[start : start + batch_size]
        questions = [turns[:-1] if turns[-1].role == "assistant" else turns for turns in (one.turns for one in batch)]
        answers += generate_answers(
            model,
            processor,
            [render_prompt(turns, processor.tokenizer, template=template) for turns in questions],
            [image for sample in batch for image in sample.images],
            template=template,
            max_new_tokens=max_new_tokens,
            synced=synced,
        )
        if progress:
            progress(len(answers), len(samples))
    return answers


def truth(sample: Sample) -> str:
    """What the sample's last turn answers.

    Raises:
        HiveError: it is not an answer.
    """
    last = sample.turns[-1]
    if last.role != "assistant":
        raise HiveError(f"sample {sample.id!r}: its last turn is the {last.role}'s, expected an answer to compare with")
    return last.content


def with_shuffled_images(samples: Sequence[Sample], seed: int) -> list[Sample]:
    """The same questions, each over another sample's images: what is still right was guessed without looking.

    Images move along one random cycle, so none stays. Samples must hold equally many images.

    Raises:
        HiveError: fewer than two samples, or unequal numbers of images.
    """
    if len(samples) < 2:
        raise HiveError(f"{len(samples)} samples: expected at least 2 to shuffle images among")
    if len({len(sample.images) for sample in samples}) > 1:
        raise HiveError("samples with unequal numbers of images: their images cannot be shuffled among them")
    order = list(range(len(samples)))
    random.Random(seed).shuffle(order)
    donors = dict(zip(order, order[1:] + order[:1], strict=True))
    return [replace(sample, images=samples[donors[index]].images) for index, sample in enumerate(samples)]


@torch.no_grad()
def generate_answers(
    model: Any,
    processor: Any,
    prompts: Sequence[str],
    images: Sequence[Any],
    *,
    template: str,
    max_new_tokens: int,
    num_beams: int = 1,
    synced: bool = False,
) -> list[str]:
    """Greedy (or beam) answers to rendered prompts, in order, without surrounding spaces.

    Args:
        model: in eval mode; its ``generate`` takes what ``processor`` returns.
        processor: called with prompts and images; pads on the left.
        prompts: texts with a placeholder for each image.
        images: those of all prompts, in the order of the placeholders.
        template: what they were rendered by, as in `DataConfig`; it says what ends an answer.
        max_new_tokens: longest answer.
        num_beams: 1 is greedy.
        synced: as in `answer_samples`.
    """
    inputs = dict(processor(text=list(prompts), images=list(images) or None))
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor):
            inputs[name] = value.to(model.device, model.dtype if value.is_floating_point() else value.dtype)
    tokens = model.generate(
        **inputs,
        **GREEDY,
        num_beams=num_beams,
        max_new_tokens=max_new_tokens,
        synced_gpus=synced,
        eos_token_id=end_token_ids(processor.tokenizer, template) or None,
        pad_token_id=padding_id(processor.tokenizer),
    )
    answers = processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [answer.strip() for answer in answers]
