"""Tiny tokenizers of several kinds, image processors and samples, all built here."""

from __future__ import annotations

import io
import itertools
import random
from collections.abc import Iterable
from typing import TypeVar

import numpy as np
import transformers
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from hive_ds.data.schema import Sample, Turn, caption_sample

T = TypeVar("T")

CORPUS = [
    "A red square stands to the left of a blue circle.",
    "user assistant system USER: ASSISTANT: [INST] [/INST] What is in the picture? How many?",
    "  Two  small green triangles,\n\tand the word 'HELLO' on them.",
] * 3

CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Qwen3's habit: the last answer is written with an empty thought, which earlier ones do not get.
QWEN3 = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token }}[INST] {{ m['content'] | trim }} [/INST]"
    "{% else %} {{ m['content'] | trim }} {{ eos_token }}{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
VICUNA = (
    "{% for m in messages %}{% if m['role'] == 'user' %}USER: {{ m['content'] }} ASSISTANT:"
    "{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
# What `hive_ds.data.chat` must refuse: turns before the last are left out.
FORGETFUL = (
    "{% for m in messages[-2:] %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# And here, that an answer is closed when it is the last alone.
CLOSING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
    "{% if loop.last or m['role'] == 'user' %}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

TOKENIZERS = ("chatml", "qwen3", "llama2", "llama3", "wordpiece")


def flat(lists: Iterable[Iterable[T]]) -> list[T]:
    """The elements of all lists."""
    return list(itertools.chain.from_iterable(lists))


def make_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """chatml, qwen3: byte-level BPE without BOS; llama3: with; llama2: Unigram, metaspace; wordpiece: no spaces."""
    if kind == "llama2":
        return _unigram()
    if kind == "wordpiece":
        return _wordpiece()
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator(CORPUS, trainer)
    if kind == "llama3":
        core.post_processor = processors.ByteLevel(trim_offsets=True)  # its offsets leave spaces out, as Llama 3's do
        extra = ["<|start_header_id|>", "<|end_header_id|>"]
        core.add_special_tokens([AddedToken(token, special=True) for token in extra])
        return PreTrainedTokenizerFast(
            tokenizer_object=core, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>", chat_template=LLAMA3
        )
    core.add_special_tokens([AddedToken("<|im_start|>", special=True)])
    template = {"chatml": CHATML, "qwen3": QWEN3, "forgetful": FORGETFUL, "closing": CLOSING, "none": None}[kind]
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=template
    )


def _unigram() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.Unigram())
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    core.decoder = decoders.Metaspace(prepend_scheme="first")
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=special, unk_token="<unk>", show_progress=False)
    core.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=LLAMA2
    )


def _wordpiece() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer(lowercase=True)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=["[UNK]", "[CLS]", "[SEP]"], show_progress=False)
    core.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="[CLS]", eos_token="[SEP]", unk_token="[UNK]", chat_template=VICUNA
    )


PROCESSORS = ("siglip", "clip", "dinov2", "naflex")


def make_image_processor(kind: str = "siglip", size: int = 16) -> transformers.BaseImageProcessor:
    """Image processors of the supported encoders, 16 pixels a side; AIMv2 uses CLIP's."""
    square, shortest = {"height": size, "width": size}, {"shortest_edge": size}
    match kind:
        case "siglip":
            return transformers.SiglipImageProcessor(size=square)
        case "clip":
            return transformers.CLIPImageProcessor(size=shortest, crop_size=square)
        case "dinov2":
            return transformers.BitImageProcessor(size=shortest, crop_size=square)
        case "naflex":
            return transformers.Siglip2ImageProcessor(patch_size=4, max_num_patches=16)
    raise AssertionError(kind)


def png(colour: int = 0, size: tuple[int, int] = (8, 8)) -> bytes:
    """A PNG of one colour."""
    out = io.BytesIO()
    Image.new("RGB", size, (colour % 256, 100, 200)).save(out, "PNG")
    return out.getvalue()


def photo(seed: int = 0, size: tuple[int, int] = (24, 20)) -> Image.Image:
    """Noise, so that two images never look alike."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def make_samples(number: int, *, bad: tuple[int, ...] = ()) -> list[Sample]:
    """Captions, questions with two images and text alone, mixed; the images of ``bad`` cannot be read."""
    drawn = random.Random(0)
    samples = []
    for index in range(number):
        file = b"not an image" if index in bad else png(index)
        caption = " ".join(drawn.choices(["red", "blue", "square", "circle", "left"], k=drawn.randint(1, 6)))
        name = f"s{index:03d}"
        if index % 5 == 3 and index not in bad:
            samples.append(Sample(name, (Turn("assistant", caption),)))
        elif index % 5 == 4:
            samples.append(Sample(name, (Turn("user", "<image><image>"), Turn("assistant", caption)), (file, png(9))))
        else:
            samples.append(caption_sample(name, file, caption, {"index": index}))
    return samples
