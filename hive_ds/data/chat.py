"""Conversations in a tokenizer's chat template, and where in the text the answers are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from hive_ds.data.schema import Role, Turn
from hive_ds.errors import HiveError

_MARK = "hiveAnswerGoesHere"
"""Stands in for an answer to find where the chat template puts it; an ordinary word survives trimming."""

Span = tuple[int, int]
"""First and one past the last character."""


def tokenizer_name(tokenizer: PreTrainedTokenizerBase) -> str:
    """The name of ``tokenizer`` for messages."""
    return repr(tokenizer.name_or_path or type(tokenizer).__name__)


def render_chat(turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase, *, for_answer: bool) -> str:
    """Render ``turns`` with the tokenizer's chat template; ``for_answer`` up to where an answer's own text begins."""
    rendered = _render(turns, tokenizer, for_answer=for_answer)
    return rendered + _opening(turns, rendered, tokenizer) if for_answer else rendered


def answer_opening(turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase) -> str:
    """What the template writes between its prompt for an answer to ``turns`` and that answer; mostly nothing.

    Qwen3's writes an empty thought into the last answer, but not into the prompt. Spaces alone do not count: they are
    one token with the word that follows.
    """
    return _opening(turns, _render(turns, tokenizer, for_answer=True), tokenizer)


def _opening(turns: Sequence[Turn], prompt: str, tokenizer: PreTrainedTokenizerBase) -> str:
    answered = _render([*turns, Turn("assistant", _MARK)], tokenizer, for_answer=False)
    before, _, _ = answered.partition(_MARK)
    opening = before.removeprefix(prompt) if before.startswith(prompt) else ""
    return opening if opening.strip() else ""


def end_token_ids(tokenizer: PreTrainedTokenizerBase, template: str) -> list[int]:
    """Ids that end an answer: the tokenizer's own, and the special token that its chat template closes answers with.

    They differ where a base model that knows one learned the other's template. ``template`` as in `DataConfig`.
    """
    ends = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    if template == "chat":
        said = render_chat([Turn("user", "a"), Turn("assistant", _MARK)], tokenizer, for_answer=False)
        closing = tokenizer(said.partition(_MARK)[2].strip(), add_special_tokens=False)["input_ids"]
        first = tokenizer.added_tokens_decoder.get(closing[0]) if closing else None
        if first is not None and first.special and closing[0] not in ends:
            ends.append(int(closing[0]))
    return ends


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Id that fills up a row of a batch: the tokenizer's own, or that of the end of a text; None if it has neither."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def _render(turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase, *, for_answer: bool) -> str:
    if not tokenizer.chat_template:
        raise HiveError(
            f"tokenizer {tokenizer_name(tokenizer)}: has no chat template; use template 'plain', or set one"
        )
    messages: list[dict[str, Any]] = [{"role": turn.role, "content": turn.content} for turn in turns]
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=for_answer))
    except TemplateError as error:
        raise HiveError(f"chat template of {tokenizer_name(tokenizer)} refuses the conversation: {error}") from error


def answer_spans(turns: Sequence[Turn], rendered: str, tokenizer: PreTrainedTokenizerBase) -> list[Span]:
    """Find the characters of every answer, with what the template writes to end it, in ``rendered``.

    ``rendered`` is `render_chat` of ``turns``. HiveError where the template writes a turn otherwise when others follow.
    """
    layout = _learn_layout(tuple(turn.role for turn in turns), tokenizer, str(tokenizer.chat_template))
    if layout is not None:
        for contents in ([turn.content for turn in turns], [turn.content.strip() for turn in turns]):
            if layout.fill(contents) == rendered:
                return layout.spans(contents)
    return _search_spans(turns, rendered, tokenizer)


@dataclass(frozen=True)
class _Layout:
    """What a template writes around the contents of one sequence of roles: ``pieces`` before, between and after them.

    ``answers`` are (turn, characters of the answer before its content, and after it).
    """

    pieces: tuple[str, ...]
    answers: tuple[tuple[int, int, int], ...]

    def fill(self, contents: Sequence[str]) -> str:
        parts = [self.pieces[0]]
        for content, piece in zip(contents, self.pieces[1:], strict=True):
            parts += (content, piece)
        return "".join(parts)

    def spans(self, contents: Sequence[str]) -> list[Span]:
        ends, end = [], 0
        for piece, content in zip(self.pieces, contents, strict=False):
            end += len(piece) + len(content)
            ends.append(end)
        return [(ends[turn] - len(contents[turn]) - before, ends[turn] + after) for turn, before, after in self.answers]


@lru_cache(maxsize=256)
def _learn_layout(roles: tuple[Role, ...], tokenizer: PreTrainedTokenizerBase, template: str) -> _Layout | None:
    """The layout of conversations with ``roles``; None where the template does not write each content once, in order.

    ``template`` is that of ``tokenizer``; it is an argument because a tokenizer can be given another.
    """
    # They end alike, so that no mark is the start of another.
    marks = [f"hiveTurn{index}GoesHere" for index in range(len(roles))]
    turns = [Turn(role, mark) for role, mark in zip(roles, marks, strict=True)]
    try:
        rest = rendered = render_chat(turns, tokenizer, for_answer=False)
        spans = _search_spans(turns, rendered, tokenizer)
    except HiveError:
        return None  # the search says what is wrong, and of which sample
    if any(rendered.count(mark) != 1 for mark in marks):
        return None
    pieces = []
    for mark in marks:
        piece, found, rest = rest.partition(mark)
        if not found:
            return None
        pieces.append(piece)
    answers = []
    for turn, (start, end) in zip((turn for turn in turns if turn.role == "assistant"), spans, strict=True):
        at = rendered.index(turn.content)
        answers.append((turns.index(turn), at - start, end - at - len(turn.content)))
    return _Layout((*pieces, rest), tuple(answers))


def _search_spans(turns: Sequence[Turn], rendered: str, tokenizer: PreTrainedTokenizerBase) -> list[Span]:
    """Find every answer by rendering parts of the conversation, three times an answer.

    An answer starts where the prompt for it ends, and reaches to the mark that closes it when it is the last turn.
    Some templates (Qwen3) write the last answer otherwise than earlier ones, so each is found in the whole text.
    """
    spans = []
    for index, turn in enumerate(turns):
        if turn.role != "assistant":
            continue
        if not index:
            raise HiveError("starts with an answer; template 'chat' expects a user's turn first")
        marked = [*turns[:index], Turn("assistant", _MARK), *turns[index + 1 :]]
        prompt = _render(turns[:index], tokenizer, for_answer=True)
        before, _, after = render_chat(marked, tokenizer, for_answer=False).partition(_MARK)
        closing = render_chat(marked[: index + 1], tokenizer, for_answer=False).partition(_MARK)[2].rstrip()
        stable = rendered.startswith(prompt) and before.startswith(prompt) and after.startswith(closing)
        if not (stable and rendered.startswith(before) and rendered.endswith(after)):
            raise HiveError(
                f"chat template of {tokenizer_name(tokenizer)}: turn {index} is written otherwise when turns follow, "
                "so the answer cannot be found; use another template"
            )
        spans.append((len(prompt), len(rendered) - len(after) + len(closing)))
    return spans
