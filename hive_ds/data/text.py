"""Text of a sample: rendering, tokens, media offsets and the label mask. Training and inference share it.

A text is tokenised once, with character offsets. ``<image>`` placeholders are tokens of their own that are then
dropped: the media offset of an image is the number of other tokens before its placeholder. Labels come from the
character spans of what the assistant says, never from tokenising a part again.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase

from hive_ds.constants import IGNORE_INDEX, IMAGE_TOKEN
from hive_ds.data.chat import Span, answer_spans, render_chat, tokenizer_name
from hive_ds.data.schema import Sample, Turn
from hive_ds.errors import HiveError

TEMPLATES = ("plain", "chat")
IMAGE_POSITIONS = ("first", "after_bos")


@dataclass(frozen=True)
class EncodedText:
    """Tokens of one text without its placeholders.

    ``image_offsets[i]`` is the media offset of the i-th placeholder. ``extents[t]`` are the first and one past the
    last character of token t behind the ``front`` characters of placeholders that the text begins with; byte-level
    tokenizers may leave spaces out, so a space's may be empty.
    """

    input_ids: list[int]
    image_offsets: list[int]
    extents: list[Span]
    front: int = 0


@dataclass(frozen=True)
class EncodedSample:
    """Tokens and labels of one training sample.

    ``labels[t]`` is token t's id where the assistant says it and IGNORE_INDEX elsewhere; token 0 is never a label.
    ``cut`` tells that the text was longer than allowed and lost its end.
    """

    input_ids: list[int]
    labels: list[int]
    image_offsets: list[int]
    cut: bool = False


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Make ``<image>`` one special token of ``tokenizer`` (in place; again does nothing) and return it.

    The model never sees that token, so its embedding needs no new row. HiveError for a slow tokenizer: it has no
    character offsets.
    """
    if not tokenizer.is_fast:
        raise HiveError(
            f"tokenizer {tokenizer_name(tokenizer)}: has no character offsets; expected a fast one (tokenizer.json)"
        )
    token = AddedToken(IMAGE_TOKEN, special=True, normalized=False, lstrip=False, rstrip=False, single_word=False)
    tokenizer.add_tokens([token], special_tokens=True)
    return tokenizer


def end_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id that ends a caption; HiveError if the tokenizer has no end-of-sequence token."""
    if tokenizer.eos_token_id is None:
        raise HiveError(f"tokenizer {tokenizer_name(tokenizer)}: has no eos_token, which ends every caption")
    return int(tokenizer.eos_token_id)


def start_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id that starts a text: the tokenizer's BOS or, where it has none, its EOS."""
    return end_token_id(tokenizer) if tokenizer.bos_token_id is None else int(tokenizer.bos_token_id)


def encode_text(text: str, tokenizer: PreTrainedTokenizerBase, *, image_position: str = "first") -> EncodedText:
    """Tokenise ``text``, which may hold ``<image>``, and drop the placeholders.

    Every text starts with a special token: the one that its chat template has written or, where it begins with
    none, `start_token_id`. Images at the very front come before that token (``image_position`` "first") or after it
    ("after_bos", the published order).
    """
    body = text
    while body.startswith(IMAGE_TOKEN):
        body = body[len(IMAGE_TOKEN) :]
    front = len(text) - len(body)
    # Without transformers around it, which takes as long again; its last call may have left these switched on.
    tokens = tokenizer.backend_tokenizer
    tokens.no_truncation()
    tokens.no_padding()
    encoding = tokens.encode(body, add_special_tokens=False)
    ids: list[int] = encoding.ids
    spans: list[Span] = encoding.offsets
    if not ids or not _opens_with_special(body, ids[0], tokenizer):
        ids, spans = [start_token_id(tokenizer), *ids], [(0, 0), *spans]
    offsets = [0 if image_position == "first" else 1] * (front // len(IMAGE_TOKEN))
    image_id, place = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN), 0
    for _ in range(ids.count(image_id)):
        place = ids.index(image_id, place)
        offsets.append(place)
        del ids[place], spans[place]
    return EncodedText(ids, offsets, spans, front)


def _opens_with_special(text: str, first_id: int, tokenizer: PreTrainedTokenizerBase) -> bool:
    # Read off the text, too: an unknown word becomes <unk>, which is special but was not written.
    token = tokenizer.added_tokens_decoder.get(first_id)
    return token is not None and token.special and text.startswith(token.content)


def encode_sample(
    sample: Sample, tokenizer: PreTrainedTokenizerBase, *, template: str, image_position: str, max_length: int
) -> EncodedSample:
    """Tokenise ``sample`` for training; ``template`` and ``image_position`` as in `DataConfig`.

    A text longer than ``max_length`` tokens loses its end. HiveError, naming the sample, where that loses an image
    or all of the answer, where the sample does not fit the template, or where the template cannot be followed or
    does not write every image once.
    """
    try:
        if template == "plain":
            input_ids, labels, offsets = _encode_caption(sample, tokenizer, image_position)
        else:
            input_ids, labels, offsets = _encode_chat(sample, tokenizer, image_position)
    except HiveError as error:
        raise HiveError(f"sample {sample.id!r}: {error}") from error
    cut = len(input_ids) > max_length
    input_ids, labels = input_ids[:max_length], labels[:max_length]
    labels[0] = IGNORE_INDEX
    lost = [offset for offset in offsets if offset >= len(input_ids)]
    if lost:
        raise HiveError(f"sample {sample.id!r}: image at token {lost[0]}, but only {len(input_ids)} tokens are kept")
    if labels.count(IGNORE_INDEX) == len(labels):
        raise HiveError(f"sample {sample.id!r}: no answer within the first {max_length} tokens")
    return EncodedSample(input_ids, labels, offsets, cut)


def render_prompt(turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase, *, template: str) -> str:
    """Return the text before the answer, as in training; the last of ``turns`` is a user's.

    "plain" keeps their images alone, "chat" renders all of them.
    """
    if template == "plain":
        return IMAGE_TOKEN * sum(turn.content.count(IMAGE_TOKEN) for turn in turns)
    return render_chat(turns, tokenizer, for_answer=True)


def _encode_caption(
    sample: Sample, tokenizer: PreTrainedTokenizerBase, image_position: str
) -> tuple[list[int], list[int], list[int]]:
    answers = [turn.content.strip() for turn in sample.turns if turn.role == "assistant"]
    if len(answers) != 1:
        raise HiveError(f"has {len(answers)} answers; template 'plain' is for captions (one), use 'chat'")
    prompt = render_prompt(sample.turns, tokenizer, template="plain")
    text = encode_text(prompt + answers[0], tokenizer, image_position=image_position)
    input_ids = [*text.input_ids, end_token_id(tokenizer)]
    return input_ids, input_ids, text.image_offsets


def _encode_chat(
    sample: Sample, tokenizer: PreTrainedTokenizerBase, image_position: str
) -> tuple[list[int], list[int], list[int]]:
    rendered = render_chat(sample.turns, tokenizer, for_answer=False)
    spans = answer_spans(sample.turns, rendered, tokenizer)
    text = encode_text(rendered, tokenizer, image_position=image_position)
    if len(text.image_offsets) != len(sample.images):
        raise HiveError(
            f"chat template of {tokenizer_name(tokenizer)} writes {len(text.image_offsets)} {IMAGE_TOKEN} for "
            f"{len(sample.images)} images; expected one each: a template that writes every turn once and unchanged"
        )
    labels = [IGNORE_INDEX] * len(text.input_ids)
    for start, end in spans:
        if start < end:
            said = _tokens_within(text.extents, start - text.front, end - text.front)
            labels[said] = text.input_ids[said]
    return text.input_ids, labels, text.image_offsets


def _tokens_within(extents: Sequence[Span], start: int, end: int) -> slice:
    """The tokens that hold one of the characters ``start`` to ``end`` - 1; of an empty extent, those that lie within.

    Extents stand in order.
    """
    return slice(bisect_right(extents, start, key=itemgetter(1)), bisect_left(extents, end, key=itemgetter(0)))
