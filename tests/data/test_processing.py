"""HiveProcessor: the prompts of inference are those of training."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image
from tiny_data import PROCESSORS, make_image_processor, make_tokenizer, photo, png
from transformers import AutoImageProcessor, AutoProcessor

from hive_ds.data.images import auto_image_processor
from hive_ds.data.preprocess import make_preprocessor
from hive_ds.data.schema import Sample, Turn, caption_sample
from hive_ds.data.text import encode_sample
from hive_ds.errors import HiveError
from hive_ds.processing import HiveProcessor


def make_processor(kind: str = "llama3", images: str = "siglip", position: str = "first") -> HiveProcessor:
    return HiveProcessor(make_image_processor(images), make_tokenizer(kind), position)


@pytest.mark.parametrize("position", ["first", "after_bos"])
@pytest.mark.parametrize("kind", ["chatml", "qwen3", "llama2", "llama3", "wordpiece"])
def test_prompts_have_the_tokens_and_offsets_of_training(kind: str, position: str) -> None:
    processor = make_processor(kind, position=position)
    settings = {"image_position": position, "max_length": 500}
    turns = (
        Turn("user", "<image>\nWhat is it?"),
        Turn("assistant", "A square."),
        Turn("user", "And <image> this?"),
        Turn("assistant", "Blue circle."),
    )
    trained = encode_sample(Sample("s", turns, (b"", b"")), processor.tokenizer, template="chat", **settings)
    messages = [{"role": turn.role, "content": turn.content} for turn in turns[:3]]
    inputs = processor.apply_chat_template(messages, images=[photo(1), photo(2)], tokenize=True)
    length = inputs["input_ids"].shape[1]
    assert inputs["input_ids"][0].tolist() == trained.input_ids[:length]
    assert inputs["image_offsets"] == [trained.image_offsets]
    assert processor(processor.apply_chat_template(messages), [photo(1), photo(2)])["input_ids"].equal(
        inputs["input_ids"]
    )
    caption = caption_sample("c", b"", "A red square")
    trained = encode_sample(caption, processor.tokenizer, template="plain", **settings)
    for prompt, length in (("<image>", 1), ("<image>A red square", len(trained.input_ids) - 1)):
        inputs = processor(prompt, photo(1))
        assert inputs["input_ids"][0].tolist() == trained.input_ids[:length]
        assert inputs["image_offsets"] == [trained.image_offsets]


def test_batch_is_padded_on_the_left_with_images_prompt_by_prompt(tmp_path: Path) -> None:
    processor = make_processor()
    (tmp_path / "file.png").write_bytes(png(7, (16, 16)))
    clear = Image.new("RGBA", (16, 16), (3, 100, 200, 0))  # over white, as training has it
    images = [clear, png(3, (16, 16)), tmp_path / "file.png"]
    texts = ["A red square <image> and <image>", "no picture at all here, only text", "<image>"]
    inputs = processor(texts, images)
    rows = [processor(text, given) for text, given in zip(texts, [images[:2], None, images[2:]], strict=True)]
    width = inputs["input_ids"].shape[1]
    assert width == max(row["input_ids"].shape[1] for row in rows)
    for index, row in enumerate(rows):
        length = row["input_ids"].shape[1]
        assert inputs["input_ids"][index, width - length :].equal(row["input_ids"][0])
        assert inputs["attention_mask"][index].tolist() == [0] * (width - length) + [1] * length
    assert inputs["image_offsets"] == [row["image_offsets"][0] for row in rows]
    assert [len(offsets) for offsets in inputs["image_offsets"]] == [2, 0, 1]
    pixels = [Image.new("RGB", (16, 16), colour) for colour in ("white", (3, 100, 200), (7, 100, 200))]
    assert inputs["pixel_values"].equal(make_preprocessor(processor.image_processor)(pixels)["pixel_values"])
    for kind in (list, tuple):
        grouped = processor(iter(texts), [kind(images[:2]), kind(), kind(images[2:])], max_length=width)
        assert grouped["pixel_values"].equal(inputs["pixel_values"])
    assert "pixel_values" not in rows[1]
    moved = inputs.to(torch.bfloat16)
    assert moved["pixel_values"].dtype == torch.bfloat16
    assert moved["image_offsets"] == inputs["image_offsets"]


def test_special_tokens_are_decoded_only_where_asked_for() -> None:
    processor = make_processor()
    rows = processor(["A red square", "red"])["input_ids"]
    for more, skip in (({}, True), ({"skip_special_tokens": False}, False)):
        expected = [processor.tokenizer.decode(row, skip_special_tokens=skip) for row in rows]
        assert [processor.decode(row, **more) for row in rows] == processor.batch_decode(rows, **more) == expected
    assert processor.decode(rows[0]) != processor.decode(rows[0], skip_special_tokens=False)


@pytest.mark.parametrize(
    ("text", "images", "message"),
    [
        ("<image>", None, "0 images: expected 1"),
        ("none", [photo(1)], "1 images: expected 0"),
        (["<image>", "<image>"], [[photo(1), photo(2)], []], r"\[2, 0\]: expected \[1, 1\]"),
        ("<image>", "/nowhere.png", "No such file"),
        ("<image>", b"junk", "cannot be read"),
        ("a b c d e f", None, "prompt of .* tokens: expected at most 3"),
        ([], None, "no prompt"),
    ],
)
def test_wrong_input_is_named(text: str, images: object, message: str) -> None:
    with pytest.raises(HiveError, match=message):
        make_processor()(text, images, max_length=3)


def test_another_image_position_is_named() -> None:
    with pytest.raises(HiveError, match="image_position 'last': expected one of first, after_bos"):
        make_processor(position="last")


@pytest.mark.parametrize(
    ("part", "file", "content"),
    [
        ("vision", "preprocessor_config.json", "[]"),
        ("vision", "preprocessor_config.json", "{"),
        ("llm", "tokenizer.json", "{}"),
    ],
)
def test_damaged_parts_are_named(part: str, file: str, content: str, tmp_path: Path) -> None:
    """Of base models, and of a model that a stage has written."""
    make_image_processor().save_pretrained(tmp_path / "vision")
    make_tokenizer("llama3").save_pretrained(tmp_path / "llm")
    HiveProcessor.from_base_models(tmp_path / "vision", tmp_path / "llm").save_pretrained(tmp_path / "both")
    for folder in (part, "both"):
        (tmp_path / folder / file).write_text(content)
    for load in (
        lambda: HiveProcessor.from_base_models(tmp_path / "vision", tmp_path / "llm"),
        lambda: HiveProcessor.from_pretrained(tmp_path / "both"),
    ):
        with pytest.raises(HiveError, match=rf"{tmp_path}.* does not load: .*; expected ") as caught:
            load()
        assert "\n" not in str(caught.value)


def test_rows_are_filled_up_with_the_padding_of_the_tokenizer() -> None:
    for kind, name in (("chatml", "pad_token_id"), ("llama3", "eos_token_id")):  # the latter has no padding of its own
        processor = make_processor(kind)
        short = processor(["red", "red square, red square"])["input_ids"][0].tolist()
        alone = processor("red")["input_ids"][0].tolist()
        padding = getattr(processor.tokenizer, name)
        assert short == [padding] * (len(short) - len(alone)) + alone
        assert len(short) > len(alone)


def test_base_model_without_chat_template_still_takes_plain_prompts() -> None:
    processor = make_processor("none")
    with pytest.raises(HiveError, match="no chat template"):
        processor.apply_chat_template([{"role": "user", "content": "Hello"}])
    assert processor("<image>", photo(1))["image_offsets"] == [[0]]


def test_content_parts_and_system_prompts_are_rendered() -> None:
    processor = make_processor("chatml")
    parts = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    system = {"role": "system", "content": "Be brief."}
    text = processor.apply_chat_template([system, {"role": "user", "content": parts}])
    assert text == processor.apply_chat_template([system, {"role": "user", "content": "<image>\nWhat is it?"}])
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>")
    assert text.endswith("<|im_end|>\n<|im_start|>assistant\n")
    with pytest.raises(HiveError, match="'video'"):
        processor.apply_chat_template([{"role": "user", "content": [{"type": "video"}]}])


@pytest.mark.parametrize("images", PROCESSORS)
def test_saved_processor_loads_by_its_class_and_by_auto_class(images: str, tmp_path: Path) -> None:
    processor = make_processor("chatml", images, "after_bos")
    processor.save_pretrained(tmp_path)
    messages = [{"role": "user", "content": "<image>What?"}]
    expected = processor.apply_chat_template(messages, images=photo(1), tokenize=True)
    for loaded in (HiveProcessor.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)):
        assert type(loaded) is HiveProcessor
        assert loaded.image_position == "after_bos"
        inputs = loaded.apply_chat_template(messages, images=photo(1), tokenize=True)
        assert inputs.keys() == expected.keys()
        for name, value in expected.items():
            assert inputs[name].equal(value) if isinstance(value, torch.Tensor) else inputs[name] == value
    with pytest.raises(HiveError, match=r"holds no processor_config\.json"):
        HiveProcessor.from_pretrained(tmp_path / "elsewhere")


def test_the_base_model_that_lacks_its_part_is_named(tmp_path: Path) -> None:
    encoder, bare = tmp_path / "encoder", tmp_path / "bare"
    make_image_processor("siglip").save_pretrained(encoder)
    bare.mkdir()
    with pytest.raises(HiveError, match=f"image processor of {bare} does not load: .*; expected the folder of a"):
        HiveProcessor.from_base_models(bare, encoder)
    with pytest.raises(HiveError, match=f"tokenizer of {bare} does not load: .*; expected the folder of a language"):
        HiveProcessor.from_base_models(encoder, bare)


@pytest.mark.skipif(not transformers.__version__.startswith("4."), reason="needs transformers 4: make test")
def test_no_notice_of_another_image_processor(tmp_path: Path) -> None:
    make_image_processor("siglip").save_pretrained(tmp_path)
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    library = logging.getLogger("transformers")
    library.addHandler(handler)
    level = library.level  # other tests may have silenced it
    library.setLevel(logging.WARNING)
    try:
        for load in (auto_image_processor, AutoImageProcessor.from_pretrained):
            transformers.utils.logging.warning_once.cache_clear()  # said once in each process
            load(tmp_path)
            if load is auto_image_processor:
                assert said == []
    finally:
        library.removeHandler(handler)
        library.setLevel(level)
    assert len(said) == 1, "transformers' own is still said"
