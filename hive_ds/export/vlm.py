"""Export a LLaVA-style model: a folder that stock transformers loads and generates from, as training's code does."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerBase

from hive_ds.constants import IMAGE_TOKEN
from hive_ds.data.chat import answer_opening, end_token_ids
from hive_ds.data.schema import Turn
from hive_ds.data.text import render_prompt, start_token_id
from hive_ds.errors import HiveError, told_as
from hive_ds.evaluation.generation import GREEDY
from hive_ds.export.card import PAPER, Section, write_card
from hive_ds.export.formats import PICTURE
from hive_ds.export.parity import check_names
from hive_ds.export.run_facts import JUDGED_MODEL
from hive_ds.export.source import find_source, read_config
from hive_ds.files import whole_folder
from hive_ds.model.cascaded import processor_values
from hive_ds.model.identity import folder_sha256, model_sha256, weight_files
from hive_ds.model.loading import load_any
from hive_ds.processing import HiveProcessor
from hive_ds.stages import VLM_STAGES

ENCODERS = ("siglip_vision_model", "clip_vision_model", "dinov2", "aimv2_vision_model")
"""Those whose patches a stock Llava takes as they are: it keeps registers, and knows no variable resolution."""
QUESTION = "What is in the picture?"
NEW_TOKENS = 8
PIXELS = 1e-3
"""Largest difference of two normalised pixels that are the same but for rounding."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Those in which `hive_ds.evaluation` judges a model."""
ANSWER = {**GREEDY, "max_new_tokens": NEW_TOKENS, "eos_token_id": None}
FLATTEN = (
    "{%- set flat = namespace(messages=[]) -%}"
    "{%- for message in messages -%}"
    "{%- if message['content'] is string -%}"
    "{%- set flat.messages = flat.messages + [message] -%}"
    "{%- else -%}"
    "{%- set lines = namespace(found=[]) -%}"
    "{%- for part in message['content'] -%}"
    "{%- set lines.found = lines.found + ['" + IMAGE_TOKEN + "' if part['type'] == 'image' else part['text']] -%}"
    "{%- endfor -%}"
    "{%- set flat.messages = flat.messages + [dict(message, content=lines.found | join('\\n'))] -%}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- set messages = flat.messages -%}"
)  # fmt: skip
"""Before an LLM's chat template, which knows text alone: images and texts of a message, a line each, as in training."""
OPENING = "{{%- if add_generation_prompt and enable_thinking is not defined -%}}{{{{- {} -}}}}{{%- endif -%}}"
"""After it, where it writes more before an answer than its prompt for one has (`answer_opening`)."""


@dataclass(frozen=True)
class VlmReport:
    """What was exported."""

    folder: Path
    vision_sha256: str
    """`weights_sha256` of the encoder in it."""
    answers: tuple[str, ...]
    """To the pictures of the check, the same in stock transformers and in training's code."""


def export_vlm(source: str | Path, out: str | Path, *, scores: Path | None = None) -> VlmReport:
    """Write a LLaVA-style model with a stock processor and a model card to a new folder.

    Weights are copied as they are. The folder is then read by stock transformers: every weight must find its place,
    and prompt tokens and greedy answers to two pictures must be those of the code that trained it (fp32).

    Args:
        source: a run's folder (its last finished stage of 4 and 5 is taken) or a model's.
        out: folder to write; it must not hold files.
        scores: a JSON file of results for the model card; None: those in the run that judged this model.

    Raises:
        HiveError: no such model in ``source``, ``out`` holds files, or stock transformers does something else.
    """
    found, out = find_source(source, VLM_STAGES), Path(out)
    config = read_config(found.folder)
    if config.model_type != "llava":
        raise HiveError(
            f"{found.folder} holds a {config.model_type} model; expected a LLaVA-style one, of stages 4 and 5"
        )
    if config.vision_config.model_type not in ENCODERS:
        raise HiveError(
            f"a stock Llava does not take a {config.vision_config.model_type} encoder's patches as they are; expected "
            f"one of {', '.join(ENCODERS)}"
        )
    own = HiveProcessor.from_pretrained(found.folder)
    placeholder = own.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    if placeholder != config.image_token_index:
        raise HiveError(
            f"{found.folder}: {IMAGE_TOKEN} is token {placeholder} of its tokenizer, but {config.image_token_index} of "
            "its config; expected the tokenizer that the model was trained with"
        )
    with whole_folder(out) as aside:
        _copy_model(found.folder, aside)
        _end_answers(found.folder, aside, own.tokenizer)
        stock_processor(own, config).save_pretrained(aside)
        answers, hashes = _check(found.folder, aside, own)
        report = VlmReport(out, folder_sha256(aside), answers)
        title, sections = "LLaVA-style model around a HIVE encoder", _sections(report, own)
        judged = (JUDGED_MODEL, hashes)
        write_card(aside, title, "transformers", sections, found, scores=scores, judged=judged)
    return report


def _copy_model(folder: Path, aside: Path) -> None:
    index = folder / "model.safetensors.index.json"
    names = [folder / "config.json", index, *weight_files(folder)]
    for file in names:
        if file.is_file():
            shutil.copyfile(file, aside / file.name)


def _end_answers(folder: Path, aside: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Have stock transformers end an answer where training's code does: a base LLM may know another end than chats."""
    file = folder / "generation_config.json"
    with told_as(str(file), "the JSON object that training writes"):
        values = dict(json.loads(file.read_text())) if file.is_file() else {}
    ends = end_token_ids(tokenizer, "plain" if tokenizer.chat_template is None else "chat")
    (aside / file.name).write_text(json.dumps({**values, "eos_token_id": ends}, indent=2) + "\n")


def stock_processor(own: HiveProcessor, config: LlavaConfig) -> LlavaProcessor:
    """The processor of stock transformers: placeholders for every patch, and a chat template that takes pictures."""
    values = processor_values(config)
    del values["processor_class"]
    template = own.tokenizer.chat_template
    if template is not None:
        opening = answer_opening([Turn("user", QUESTION)], own.tokenizer)
        template = FLATTEN + template + (OPENING.format(repr(opening)) if opening else "")
    # A tokenizer of no model's own class returns token_type_ids too, which no Llava takes.
    names = [name for name in own.tokenizer.model_input_names if name != "token_type_ids"]
    own.tokenizer.model_input_names = own.tokenizer.init_kwargs["model_input_names"] = names
    return LlavaProcessor(
        own.image_processor,
        own.tokenizer,
        chat_template=template,
        image_token=IMAGE_TOKEN,
        **values,
    )


def _check(folder: Path, aside: Path, own: HiveProcessor) -> tuple[tuple[str, ...], set[str]]:
    """Compare prompts and answers; returns these, and `model_sha256` in every dtype that a model is judged in.

    One model is in memory at a time.
    """
    pictures = [_picture(seed) for seed in (0, 1)]
    stock = LlavaProcessor.from_pretrained(aside)
    theirs = [stock_inputs(stock, own, picture) for picture in pictures]
    ours = [_own_inputs(own, picture) for picture in pictures]
    for one, other in zip(theirs, ours, strict=True):
        _check_prompt(one, other, stock.image_token_id)
    trained = load_any(folder)
    expected, hashes = _answers(trained, ours), {model_sha256(trained, dtype) for dtype in DTYPES}
    del trained
    model, loaded = LlavaForConditionalGeneration.from_pretrained(aside, dtype=torch.float32, output_loading_info=True)
    check_names(sorted(loaded["missing_keys"]), sorted(loaded["unexpected_keys"]), "stock transformers")
    answers = _answers(model.eval(), theirs)
    if answers != expected:
        raise HiveError(
            f"export of {folder}: stock transformers answers {answers}, the code that trained it {expected}; expected "
            "the same tokens; nothing was exported"
        )
    return tuple(own.decode(answer) for answer in answers), hashes


def _picture(seed: int) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    return Image.fromarray(torch.randint(0, 256, (64, 96, 3), generator=generator, dtype=torch.uint8).numpy())


def stock_inputs(stock: LlavaProcessor, own: HiveProcessor, picture: Image.Image) -> dict[str, Any]:
    """A question on a picture as a user of stock transformers asks it; without a chat template, the picture alone."""
    if own.tokenizer.chat_template is None:
        return dict(stock(text=_plain_prompt(own), images=picture, add_special_tokens=False, return_tensors="pt"))
    content = [{"type": "image", "image": picture}, {"type": "text", "text": QUESTION}]
    return dict(
        stock.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
    )


def _plain_prompt(own: HiveProcessor) -> str:
    start = own.tokenizer.convert_ids_to_tokens(start_token_id(own.tokenizer))
    return f"{IMAGE_TOKEN}{start}" if own.image_position == "first" else f"{start}{IMAGE_TOKEN}"


def _own_inputs(own: HiveProcessor, picture: Image.Image) -> dict[str, Any]:
    template = "plain" if own.tokenizer.chat_template is None else "chat"
    prompt = render_prompt([Turn("user", f"{IMAGE_TOKEN}\n{QUESTION}")], own.tokenizer, template=template)
    return dict(own(prompt, [picture]))


def _check_prompt(theirs: dict[str, Any], ours: dict[str, Any], image_token_id: int) -> None:
    """Refuse a processor that reads a prompt or a picture otherwise than training's.

    Raises:
        HiveError: names what differs.
    """
    ids = theirs["input_ids"][0]
    text, first = ids[ids != image_token_id].tolist(), int((ids == image_token_id).nonzero()[0, 0])
    expected, offset = ours["input_ids"][0].tolist(), ours["image_offsets"][0][0]
    if (text, first) != (expected, offset):
        raise HiveError(
            f"stock transformers makes tokens {text} of a prompt, with the picture at {first}; training's are "
            f"{expected}, with the picture at {offset}: a stock Llava cannot use this tokenizer or chat template"
        )
    # Training computes them its own way, equal to a hundredth of a level of 255 (`hive_ds.data.preprocess`).
    if not torch.allclose(theirs["pixel_values"], ours["pixel_values"], rtol=0, atol=PIXELS):
        raise HiveError("stock transformers makes other pixels of a picture than training's code")


@torch.no_grad()
def _answers(model: Any, prompts: list[dict[str, Any]]) -> list[list[int]]:
    found = []
    for inputs in prompts:
        arguments = {**inputs, **ANSWER, "pad_token_id": 0}
        found.append(model.generate(**arguments)[0, inputs["input_ids"].shape[1] :].tolist())
    return found


def _sections(report: VlmReport, own: HiveProcessor) -> list[Section]:
    about = (
        f"A stock `LlavaForConditionalGeneration`, trained to judge the vision encoder in it, which was pre-trained "
        f"through a language model ({PAPER}). Prompt tokens, pixels and greedy answers to two pictures were compared "
        "with those of the code that trained it, in fp32: they are the same."
    )
    identity = f"Weights of the vision encoder, sha256: `{report.vision_sha256}` (`hive_ds.model.identity`)."
    return [
        Section("What it is", about),
        Section("Use", f"```python\n{_usage(report.folder.name, own)}\n```"),
        Section("Identity", identity),
    ]


def _usage(name: str, own: HiveProcessor) -> str:
    load = (
        "from PIL import Image\nfrom transformers import AutoProcessor, LlavaForConditionalGeneration\n\n"
        f'processor = AutoProcessor.from_pretrained("{name}")\n'
        f'model = LlavaForConditionalGeneration.from_pretrained("{name}")\n'
        f"picture = {PICTURE}\n"
    )
    if own.tokenizer.chat_template is None:
        ask = (
            f'inputs = processor(text="{_plain_prompt(own)}", images=picture, add_special_tokens=False, '
            'return_tensors="pt")\n'
        )
    else:
        ask = (
            'content = [{"type": "image", "image": picture}, {"type": "text", "text": "' + QUESTION + '"}]\n'
            "inputs = processor.apply_chat_template(\n"
            '    [{"role": "user", "content": content}],\n'
            "    add_generation_prompt=True,\n"
            "    tokenize=True,\n"
            "    return_dict=True,\n"
            '    return_tensors="pt",\n'
            ")\n"
        )
    start = 'inputs["input_ids"].shape[1]'
    return f"{load}{ask}answer = model.generate(**inputs)[0, {start} :]\nprint(processor.decode(answer))"
