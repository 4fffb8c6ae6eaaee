"""Tokens, media offsets and label masks on tokenizers of several kinds."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_data import CHATML, TOKENIZERS, make_tokenizer
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from hive_ds.constants import IGNORE_INDEX
from hive_ds.data.chat import end_token_ids
from hive_ds.data.schema import Sample, Turn, caption_sample
from hive_ds.data.text import encode_sample, encode_text, prepare_tokenizer, render_prompt, start_token_id
from hive_ds.errors import HiveError

KEEP_ALL = {"image_position": "first", "max_length": 10_000}
CLOSING = {
    "chatml": "<|im_end|>",
    "qwen3": "<|im_end|>",
    "llama2": " </s>",
    "llama3": "<|eot_id|>",
    "wordpiece": "[SEP]",
}
"""What a template writes after an answer to end it."""
LETTERS = "abc  \n.é日🙂'"


@cache
def tokenizer(kind: str) -> PreTrainedTokenizerFast:
    return prepare_tokenizer(make_tokenizer(kind))


def conversation() -> Sample:
    turns = (
        Turn("user", "<image>\nWhat is in the picture?"),
        Turn("assistant", "A red  square."),
        Turn("user", "And <image>here?"),
        Turn("assistant", "Two triangles,\nand a circle"),
    )
    return Sample("talk", turns, (b"1", b"2"))


def runs(labels: list[int]) -> list[list[int]]:
    """The supervised stretches."""
    found: list[list[int]] = []
    for index, label in enumerate(labels):
        if label != IGNORE_INDEX:
            if not index or labels[index - 1] == IGNORE_INDEX:
                found.append([])
            found[-1].append(label)
    return found


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_chat_labels_are_the_answers_and_their_end(kind: str) -> None:
    tok, sample = tokenizer(kind), conversation()
    encoded = encode_sample(sample, tok, template="chat", **KEEP_ALL)
    assert all(label in (IGNORE_INDEX, token) for token, label in zip(encoded.input_ids, encoded.labels, strict=True))
    said = [tok.decode(run) for run in runs(encoded.labels)]
    answers = [turn.content + CLOSING[kind] for turn in sample.turns if turn.role == "assistant"]
    if kind == "qwen3":
        answers[1] = "<think>\n\n</think>\n\n" + answers[1]
    if kind == "llama3":
        assert tok.convert_tokens_to_ids("<|eot_id|>") in encoded.labels
    if kind == "wordpiece":  # its decoder guesses the spaces and has lost the case
        said, answers = (["".join(text.lower().split()) for text in texts] for texts in (said, answers))
    assert [text.strip() for text in said] == answers


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("answer", [1, 3])
def test_prompt_at_inference_has_the_tokens_of_training(kind: str, answer: int) -> None:
    tok, sample = tokenizer(kind), conversation()
    sample = Sample("x", sample.turns[: answer + 1], sample.images[:1] if answer == 1 else sample.images)
    encoded = encode_sample(sample, tok, template="chat", **KEEP_ALL)
    prompt = encode_text(render_prompt(sample.turns[:answer], tok, template="chat"), tok, image_position="first")
    length = len(prompt.input_ids)
    assert encoded.input_ids[:length] == prompt.input_ids
    assert encoded.image_offsets[: len(prompt.image_offsets)] == prompt.image_offsets
    assert encoded.labels[length] != IGNORE_INDEX
    if kind == "qwen3":  # its template writes an empty thought into the last answer, and the model need not say it
        assert tok.decode(prompt.input_ids).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    else:
        assert encoded.labels[length - 1] == IGNORE_INDEX


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("position", ["first", "after_bos"])
def test_caption_is_start_caption_end(kind: str, position: str) -> None:
    tok, caption = tokenizer(kind), "A red square, and two small green triangles."
    sample = caption_sample("c", b"1", f" {caption}\n")
    encoded = encode_sample(sample, tok, template="plain", image_position=position, max_length=100)
    words = tok(caption, add_special_tokens=False)["input_ids"]
    start = tok.eos_token_id if kind in ("chatml", "qwen3") else tok.bos_token_id
    assert encoded.input_ids == [start, *words, tok.eos_token_id]
    assert encoded.labels == [IGNORE_INDEX, *words, tok.eos_token_id]
    assert encoded.image_offsets == [0 if position == "first" else 1]
    prompt = encode_text(render_prompt(sample.turns[:1], tok, template="plain"), tok, image_position=position)
    assert (prompt.input_ids, prompt.image_offsets) == ([start], encoded.image_offsets)


@pytest.mark.parametrize("kind", ["chatml", "llama3"])
def test_media_offset_counts_the_tokens_before_the_placeholder(kind: str) -> None:
    tok = tokenizer(kind)
    parts = ["Left:", " then ", "", " and\nlast", "."]
    encoded = encode_text("<image>".join(parts), tok)
    pieces = [tok(part, add_special_tokens=False)["input_ids"] for part in parts]
    ids = [start_token_id(tok)]
    expected = []
    for piece in pieces:
        ids += piece
        expected.append(len(ids))
    assert encoded.input_ids == ids
    assert encoded.image_offsets == expected[:-1]


@settings(max_examples=150, deadline=None)
@given(kind=st.sampled_from(["chatml", "qwen3", "llama3"]), data=st.data())
def test_labels_spell_any_answer_exactly(kind: str, data: st.DataObject) -> None:
    """Byte-level tokens lose nothing, so the labels of each answer decode to it: spaces, halves of characters, all."""
    tok = tokenizer(kind)
    words = st.text(LETTERS, min_size=1, max_size=12).filter(str.strip)
    turns = []
    for _ in range(data.draw(st.integers(1, 3))):
        turns += [Turn("user", data.draw(words)), Turn("assistant", data.draw(words))]
    encoded = encode_sample(Sample("x", tuple(turns)), tok, template="chat", **KEEP_ALL)
    said = [tok.decode(run, clean_up_tokenization_spaces=False) for run in runs(encoded.labels)]
    answers = [turn.content for turn in turns if turn.role == "assistant"]
    answers = [(text.strip() if kind == "llama3" else text) + CLOSING[kind] for text in answers]
    if kind == "qwen3":
        answers[-1] = "<think>\n\n</think>\n\n" + answers[-1]
    assert said == answers


@settings(max_examples=150, deadline=None)
@given(kind=st.sampled_from(TOKENIZERS), template=st.sampled_from(["plain", "chat"]), data=st.data())
def test_no_length_cuts_an_image_away_unnoticed(kind: str, template: str, data: st.DataObject) -> None:
    tok = tokenizer(kind)
    question = data.draw(st.lists(st.sampled_from(["red", "square", "<image>"]), max_size=8).map(" ".join))
    answer = data.draw(st.lists(st.sampled_from(["blue", "circle"]), min_size=1, max_size=8).map(" ".join))
    images = (b"1",) * question.count("<image>")
    sample = Sample("long-one", (Turn("user", question), Turn("assistant", answer)), images)
    whole = encode_sample(sample, tok, template=template, **KEEP_ALL)
    length = data.draw(st.integers(1, len(whole.input_ids) + 2))
    fits = all(offset < length for offset in whole.image_offsets)
    supervised = any(label != IGNORE_INDEX for label in whole.labels[:length])
    if fits and supervised:
        encoded = encode_sample(sample, tok, template=template, image_position="first", max_length=length)
        assert encoded.input_ids == whole.input_ids[:length]
        assert encoded.labels == whole.labels[:length]
        assert encoded.image_offsets == whole.image_offsets
        assert encoded.cut == (length < len(whole.input_ids))
    else:
        with pytest.raises(HiveError, match="'long-one'"):
            encode_sample(sample, tok, template=template, image_position="first", max_length=length)


def test_an_image_after_the_last_token_kept_is_lost() -> None:
    """No token would see it."""
    tok, sample = tokenizer("chatml"), conversation()
    *_, offset = encode_sample(sample, tok, template="chat", **KEEP_ALL).image_offsets
    with pytest.raises(HiveError, match=rf"'talk': image at token {offset}, but only {offset} tokens are kept"):
        encode_sample(sample, tok, template="chat", image_position="first", max_length=offset)
    assert encode_sample(sample, tok, template="chat", image_position="first", max_length=offset + 1).cut


def test_answers_are_found_behind_an_image_that_opens_the_text() -> None:
    tok = prepare_tokenizer(make_tokenizer("chatml"))
    tok.chat_template = "{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}"
    encoded = encode_sample(conversation(), tok, template="chat", **KEEP_ALL)
    answers = [turn.content + "<|im_end|>" for turn in conversation().turns if turn.role == "assistant"]
    assert [tok.decode(run) for run in runs(encoded.labels)] == answers
    assert encoded.image_offsets[0] == 0


@pytest.mark.parametrize("kind", ["llama2", "llama3"])
def test_token_that_opens_a_text_is_never_a_label(kind: str) -> None:
    """Of a caption that writes it itself, neither: in a packed batch the sample before would be asked for it."""
    tok = tokenizer(kind)
    encoded = encode_sample(caption_sample("c", b"1", f"{tok.bos_token}red"), tok, template="plain", **KEEP_ALL)
    assert encoded.input_ids[0] == tok.bos_token_id
    assert encoded.input_ids.count(tok.bos_token_id) == 1
    assert encoded.labels == [IGNORE_INDEX, *encoded.input_ids[1:]]


def test_ends_of_answers_are_special_tokens_alone() -> None:
    tok = make_tokenizer("chatml")
    tok.chat_template = CHATML.replace("<|im_end|>", "<end>")
    tok.add_tokens(["<end>"])
    assert end_token_ids(tok, "chat") == [tok.eos_token_id]
    tok.add_tokens(["<end>"], special_tokens=True)
    assert end_token_ids(tok, "chat") == [tok.eos_token_id, tok.convert_tokens_to_ids("<end>")]
    assert end_token_ids(tok, "plain") == [tok.eos_token_id]


def test_tokenizer_that_lacks_what_is_needed_is_named() -> None:
    with pytest.raises(HiveError, match=r"^tokenizer 'ByT5Tokenizer': has no character offsets; expected a fast one"):
        prepare_tokenizer(ByT5Tokenizer())
    tok = prepare_tokenizer(make_tokenizer("chatml"))
    tok.eos_token = None
    with pytest.raises(HiveError, match=r"^sample 'c': tokenizer .*: has no eos_token, which ends every caption$"):
        encode_sample(caption_sample("c", b"1", "red"), tok, template="plain", **KEEP_ALL)


def test_unknown_first_word_does_not_pass_for_a_start_token() -> None:
    tok = tokenizer("wordpiece")
    assert encode_text("日 red", tok).input_ids[:2] == [tok.bos_token_id, tok.unk_token_id]


@pytest.mark.parametrize(
    ("kind", "template", "turns", "message"),
    [
        ("none", "chat", conversation().turns, "no chat template"),
        ("forgetful", "chat", conversation().turns, "written otherwise"),
        ("closing", "chat", conversation().turns, "turn 1 is written otherwise"),
        ("chatml", "chat", (Turn("assistant", "Hello."),), "starts with an answer"),
        ("chatml", "plain", conversation().turns, "2 answers"),
    ],
)
def test_what_cannot_be_encoded_is_named(kind: str, template: str, turns: tuple[Turn, ...], message: str) -> None:
    images = (b"1",) * sum(turn.content.count("<image>") for turn in turns)
    with pytest.raises(HiveError, match=f"'odd'.*{message}"):
        encode_sample(Sample("odd", turns, images), tokenizer(kind), template=template, **KEEP_ALL)


@pytest.mark.parametrize(
    ("content", "placeholders"),
    [
        ("{{ m['content'] | replace('<image>', '') }}", 0),
        ("{{ m['content'] | striptags }}", 0),
        ("{{ m['content'] }}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}", 4),
    ],
)
def test_template_that_loses_or_repeats_images_is_refused(content: str, placeholders: int) -> None:
    tok = prepare_tokenizer(make_tokenizer("chatml"))
    tok.chat_template = CHATML.replace("{{ m['content'] }}", content)
    message = f"'talk': chat template of .* writes {placeholders} <image> for 2 images; expected one each"
    with pytest.raises(HiveError, match=message):
        encode_sample(conversation(), tok, template="chat", **KEEP_ALL)


@pytest.mark.parametrize(
    ("turns", "images", "message"),
    [
        ((Turn("user", "<image>"), Turn("assistant", "x")), (), "1 <image> in the text, but 0 images"),
        ((Turn("user", "q"), Turn("assistant", "<image>")), (b"",), "assistant's"),
        ((Turn("user", "q"), Turn("assistant", " ")), (), "nothing to learn"),
        ((Turn("user", "q\ud83d"), Turn("assistant", "x")), (), "surrogate"),
        ((Turn("user", 3), Turn("assistant", "x")), (), "content of type int, expected str"),  # type: ignore[arg-type]
        ((Turn("system", "q"), Turn("assistant", "x")), (), "role 'system'"),  # type: ignore[arg-type]
    ],
)
def test_sample_that_makes_no_sense_is_named(turns: tuple[Turn, ...], images: tuple[bytes, ...], message: str) -> None:
    with pytest.raises(HiveError, match=f"'odd'.*{message}"):
        Sample("odd", turns, images)
    for id in ("", "half \ud83d", 3):
        with pytest.raises(HiveError, match=r"^sample id .*: expected a non-empty string that UTF-8 can hold$"):
            Sample(id, (Turn("user", "q"), Turn("assistant", "x")))  # type: ignore[arg-type]
