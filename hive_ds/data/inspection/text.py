"""What a tokenizer makes of samples: how many tokens, which carry loss, which are cut, which samples are refused."""

from __future__ import annotations

import re
from dataclasses import dataclass

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hive_ds.config import DataConfig
from hive_ds.constants import IGNORE_INDEX
from hive_ds.data.schema import Sample
from hive_ds.data.text import TEMPLATES, EncodedSample, encode_sample, prepare_tokenizer
from hive_ds.errors import HiveError, require_one_of

NO_LIMIT = 1 << 62
"""A length that cuts nothing."""


@dataclass(frozen=True)
class TextSettings:
    """How text becomes tokens: a tokenizer's name or folder, and what `hive_ds.config.DataConfig` calls the rest."""

    tokenizer: str
    template: str = DataConfig.template
    max_length: int = DataConfig.max_length

    def __post_init__(self) -> None:
        require_one_of("template", self.template, TEMPLATES)
        if self.max_length < 2:
            raise HiveError(f"max-length is {self.max_length}, expected at least 2")

    def __str__(self) -> str:
        return f"{self.tokenizer}, template {self.template}, at most {self.max_length} tokens"

    def load(self) -> PreTrainedTokenizerBase:
        """Load the tokenizer, with ``<image>`` as a token; HiveError where that cannot be done."""
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.tokenizer)
        except Exception as error:  # the hub, tokenizers and sentencepiece each raise their own
            reason = str(error).strip().split("\n", 1)[0]
            raise HiveError(f"tokenizer {self.tokenizer}: cannot be loaded ({reason})") from error
        return prepare_tokenizer(tokenizer)


@dataclass(frozen=True)
class TextReport:
    """One sample as tokens: whole, as training sees it, and why training refuses it where it does.

    ``whole`` is None where the sample does not fit the template; ``kept`` is None where training refuses it.
    """

    whole: EncodedSample | None
    kept: EncodedSample | None
    reason: str = ""
    lossless: bool = False
    """No token within the limit carries loss."""


def report_text(sample: Sample, tokenizer: PreTrainedTokenizerBase, settings: TextSettings) -> TextReport:
    """Tokenise ``sample`` as training does, and once more without a limit where that loses something."""
    try:
        kept = _encode(sample, tokenizer, settings, settings.max_length)
    except HiveError as error:
        reason = str(error).removeprefix(f"sample {sample.id!r}: ")
        try:
            whole = _encode(sample, tokenizer, settings, NO_LIMIT)
        except HiveError:
            return TextReport(None, None, reason)
        return TextReport(whole, None, reason, supervised(whole.labels[: settings.max_length]) == 0)
    whole = _encode(sample, tokenizer, settings, NO_LIMIT) if kept.cut else kept
    return TextReport(whole, kept, lossless=supervised(kept.labels) == 0)


def _encode(
    sample: Sample, tokenizer: PreTrainedTokenizerBase, settings: TextSettings, max_length: int
) -> EncodedSample:
    position = DataConfig.image_position
    return encode_sample(sample, tokenizer, template=settings.template, image_position=position, max_length=max_length)


def supervised(labels: list[int]) -> int:
    """Number of ``labels`` that carry loss."""
    return sum(label != IGNORE_INDEX for label in labels)


def kind_of(reason: str) -> str:
    """``reason`` with its numbers taken out, so that equal troubles of many samples count as one."""
    return re.sub(r"\d+", "N", reason)
