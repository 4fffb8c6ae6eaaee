"""Answers found in one rendering are those that the search through many finds, for any contents."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_data import CHATML, TOKENIZERS, make_tokenizer
from transformers import PreTrainedTokenizerFast

from hive_ds.data import chat
from hive_ds.data.chat import answer_spans, render_chat
from hive_ds.data.schema import Turn
from hive_ds.data.text import _tokens_within, encode_text, prepare_tokenizer
from hive_ds.errors import HiveError

CONTENTS = st.lists(
    st.sampled_from(
        [" ", "\n", "red", "é日🙂", "hiveTurn0GoesHere", "hiveTurn1", "<|im_end|>", "[/INST]", " </s>", "<image>"]
    )
    | st.text(max_size=4),
    max_size=5,
).map("".join)


@cache
def tokenizer(kind: str) -> PreTrainedTokenizerFast:
    return prepare_tokenizer(make_tokenizer(kind))


def spans_or_error(find: Callable[..., list[tuple[int, int]]], *arguments: object) -> object:
    try:
        return find(*arguments)
    except HiveError as error:
        return str(error)


@settings(max_examples=300, deadline=None)
@given(kind=st.sampled_from(TOKENIZERS), contents=st.lists(CONTENTS, min_size=2, max_size=6), swap=st.booleans())
def test_spans_are_those_of_the_search(kind: str, contents: list[str], swap: bool) -> None:
    roles = ["user", "assistant"] * 3
    if swap and len(contents) > 3:
        roles[2:4] = ["assistant", "user"]  # two answers in a row
    turns = [Turn(role, content) for role, content in zip(roles, contents, strict=False)]  # type: ignore[arg-type]
    rendered = render_chat(turns, tokenizer(kind), for_answer=False)
    found = [spans_or_error(find, turns, rendered, tokenizer(kind)) for find in (answer_spans, chat._search_spans)]
    assert found[0] == found[1]


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_usual_conversation_is_not_searched(kind: str) -> None:
    def conversation(word: str) -> list[Turn]:
        return [Turn("user", f"What {word}?"), Turn("assistant", f" {word} "), Turn("user", "?"), Turn("assistant", "")]

    first = conversation("red")
    answer_spans(first, render_chat(first, tokenizer(kind), for_answer=False), tokenizer(kind))
    second = conversation("green")
    rendered = render_chat(second, tokenizer(kind), for_answer=False)
    with patch.object(chat, "_search_spans", side_effect=AssertionError):
        spans = answer_spans(second, rendered, tokenizer(kind))
    assert [rendered[start:end].count("green") for start, end in spans] == [1, 0]


def test_another_template_is_learned_anew() -> None:
    tok, turns = make_tokenizer("chatml"), [Turn("user", "a"), Turn("assistant", "b")]
    answer_spans(turns, render_chat(turns, tok, for_answer=False), tok)
    tok.chat_template = CHATML.replace("<|im_end|>", "!!!")
    rendered = render_chat(turns, tok, for_answer=False)
    assert [rendered[start:end] for start, end in answer_spans(turns, rendered, tok)] == ["b!!!"]


@settings(max_examples=200, deadline=None)
@given(cuts=st.lists(st.integers(0, 30), max_size=8).map(sorted), points=st.lists(st.tuples(*[st.integers(0, 30)] * 2)))
def test_tokens_inside_answers(cuts: list[int], points: list[tuple[int, int]]) -> None:
    spans = [(a, b) for a, b in zip(cuts[::2], cuts[1::2], strict=False) if a < b]
    extents = list(zip(sorted(map(min, points)), sorted(map(max, points)), strict=True))
    expected = {
        token
        for token, (start, end) in enumerate(extents)
        if any(a < start < b if start == end else max(start, a) < min(end, b) for a, b in spans)
    }
    numbers = list(range(len(extents)))
    assert {token for span in spans for token in numbers[_tokens_within(extents, *span)]} == expected


@settings(max_examples=200, deadline=None)
@given(kind=st.sampled_from(TOKENIZERS), contents=st.lists(CONTENTS, max_size=4))
def test_extents_stand_in_order(kind: str, contents: list[str]) -> None:
    """Which tokens an answer has is found by bisection."""
    extents = encode_text("<image>".join(contents), tokenizer(kind)).extents
    assert [start for start, _ in extents] == sorted(start for start, _ in extents)
    assert [end for _, end in extents] == sorted(end for _, end in extents)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_tokenizer_used_before_neither_cuts_nor_pads(kind: str) -> None:
    tok, text = prepare_tokenizer(make_tokenizer(kind)), "what colour is the circle?"
    alone = encode_text(text, tok)
    if tok.pad_token is None:
        tok.pad_token = tok.eos_token
    for length in (3, 30):
        tok(["red", text], truncation=True, max_length=length, padding="max_length")
        assert encode_text(text, tok) == alone
    assert encode_text(text, tok).input_ids[-3:] == tok(text, add_special_tokens=False).input_ids[-3:]
