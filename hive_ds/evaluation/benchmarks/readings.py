"""How answers are read where the authors of a benchmark read them otherwise than lmms-eval."""

from __future__ import annotations

from functools import lru_cache

from lmms_eval.tasks._task_utils.vqa_eval_metric import EvalAIAnswerProcessor

MME_PERCEPTION = (
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "OCR",
)
MME_COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")


def pope_says_yes(answer: str) -> bool:
    """POPE's own rule: the first sentence says no where one of its words is "No", "no" or "not"; else it says yes.

    Source: the evaluation script of Li et al., 2023 (arXiv 2305.10355). lmms-eval wants exactly "yes" or "no": it
    counts "Yes." as wrong, and as neither in precision and recall.
    """
    sentence = answer.partition(".")[0].replace(",", "")
    return not {"No", "no", "not"} & set(sentence.split(" "))


def mme_says(answer: str) -> str:
    """MME's own rule: ``yes`` or ``no`` if the first four characters hold it, else ``other``.

    Source: the evaluation tool of Fu et al., 2023 (arXiv 2306.13394). lmms-eval also drops full stops first and takes
    "y" and "n".
    """
    start = answer.lower().strip()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


@lru_cache(maxsize=1 << 16)
def vqa_normal(answer: str) -> str:
    """An answer as VQA accuracy compares it: lower case, without articles and punctuation, numbers as digits."""
    return str(_normalise(answer))


_normalise = EvalAIAnswerProcessor()
