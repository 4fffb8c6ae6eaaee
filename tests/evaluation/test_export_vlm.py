"""The exported LLaVA-style model is stock transformers' own: it loads, reads prompts as in training, answers alike."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from export_models import PROCESSORS, randomize, save_hive
from huggingface_hub import save_torch_state_dict
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_data import make_tokenizer
from tiny_models import text_config, tiny_encoder
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaProcessor

from hive_ds.constants import IMAGE_TOKEN
from hive_ds.data.chat import end_token_ids
from hive_ds.data.schema import Turn
from hive_ds.data.text import prepare_tokenizer, render_chat
from hive_ds.errors import HiveError
from hive_ds.export import export_vlm, vlm
from hive_ds.model import cascaded
from hive_ds.model.cascaded import CascadedForCausalLM, cascaded_config, processor_values
from hive_ds.model.identity import folder_sha256, model_sha256, weights_sha256
from hive_ds.model.loading import load_any
from hive_ds.processing import HiveProcessor
from hive_ds.recipe import dump_recipe, load_recipe


def save_vlm(
    folder: Path, vision: str = "siglip", tokenizer: str = "chatml", tied: bool = False
) -> CascadedForCausalLM:
    """A random cascaded model with its processor, as training leaves them."""
    words = prepare_tokenizer(make_tokenizer(tokenizer))
    encoder = tiny_encoder(vision)
    config = cascaded_config(
        encoder.config,
        text_config("qwen2", vocab_size=len(words), tie_word_embeddings=tied),
        feature_block=-2,
        image_token_id=words.convert_tokens_to_ids(IMAGE_TOKEN),
        vision_sha256=weights_sha256(encoder.state_dict().items()),
    )
    model = CascadedForCausalLM(config, encoder)
    randomize(model.projector)
    randomize(model.language_model)
    model.save_pretrained(folder)
    HiveProcessor(PROCESSORS[vision], words, stock=processor_values(model.config)).save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize(
    ("vision", "tokenizer", "tied"),
    [("siglip", "chatml", True), ("clip", "llama3", False), ("dinov2", "qwen3", True), ("aimv2", "none", False)],
)
def test_stock_transformers_answers_as_training_does(vision: str, tokenizer: str, tied: bool, tmp_path) -> None:
    model = save_vlm(tmp_path / "model", vision, tokenizer, tied)
    if tokenizer == "qwen3":  # a folder whose processor says nothing to stock transformers
        HiveProcessor(PROCESSORS[vision], make_tokenizer(tokenizer)).save_pretrained(tmp_path / "model")
    report = export_vlm(tmp_path / "model", tmp_path / "out")
    stock = AutoModelForImageTextToText.from_pretrained(tmp_path / "out").eval()
    assert type(stock).__name__ == "LlavaForConditionalGeneration"
    assert (stock.lm_head.weight is stock.get_input_embeddings().weight) == tied
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    assert isinstance(processor, LlavaProcessor)
    own = HiveProcessor.from_pretrained(tmp_path / "model")
    pixels = torch.randint(0, 256, (40, 60, 3), generator=torch.Generator().manual_seed(5), dtype=torch.uint8)
    picture = Image.fromarray(pixels.numpy())
    theirs = vlm.stock_inputs(processor, own, picture)
    ours = vlm._own_inputs(own, picture)
    with torch.no_grad():
        logits = stock(**theirs).logits[0, -1]
        torch.testing.assert_close(model(**ours).logits[0, -1], logits, atol=1e-5, rtol=1e-5)
        options = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": None, "pad_token_id": 0}
        answer = stock.generate(**theirs, **options)[0, theirs["input_ids"].shape[1] :]
        assert torch.equal(model.generate(**ours, **options)[0, ours["input_ids"].shape[1] :], answer)
    assert len(set(answer.tolist())) > 1
    template = "plain" if tokenizer == "none" else "chat"
    assert stock.generation_config.eos_token_id == end_token_ids(own.tokenizer, template)
    assert report.vision_sha256 == folder_sha256(tmp_path / "out") == weights_sha256(model.state_dict().items())
    assert report.vision_sha256 in (tmp_path / "out" / "README.md").read_text()


def test_weights_in_several_files_are_copied_with_their_index(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(cascaded, "save_torch_state_dict", partial(save_torch_state_dict, max_shard_size="50kB"))
    save_vlm(tmp_path / "model")
    report = export_vlm(tmp_path / "model", tmp_path / "out")
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    assert report.vision_sha256 == folder_sha256(tmp_path / "model")


def test_a_run_without_such_a_model_is_told_which_stages_hold_one(tmp_path) -> None:
    (tmp_path / "stage3").mkdir()
    (tmp_path / "stage3" / "DONE").touch()
    with pytest.raises(HiveError, match=r"stages 3 are finished; expected one of 4, 5, which hold such a model$"):
        export_vlm(tmp_path, tmp_path / "out")


def test_the_card_says_how_to_ask(tmp_path, monkeypatch) -> None:
    save_vlm(tmp_path / "model")
    report = export_vlm(tmp_path / "model", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0]
    Image.new("L", (50, 40), 200).save(tmp_path / "picture.jpg")  # grey: some image processors take colours alone
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(code.replace("(**inputs)", "(**inputs, max_new_tokens=3, pad_token_id=0)"), names)
    assert names["answer"].shape == (3,)
    assert len(report.answers) == 2


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("config.json", "model has no config.json of a model: "),
        ("generation_config.json", "model/generation_config.json: .*; expected the JSON object that training writes"),
    ],
)
def test_damaged_configs_are_named(file: str, message: str, tmp_path) -> None:
    save_vlm(tmp_path / "model")
    for damaged in (b"", b"{", b"[1]", b"null", b"\xff"):
        (tmp_path / "model" / file).write_bytes(damaged)
        with pytest.raises(HiveError, match=message):
            export_vlm(tmp_path / "model", tmp_path / "out")


def test_the_card_shows_scores_of_this_model_alone(tmp_path) -> None:
    """Stages 4 and 5 of a run are two models around one encoder; the other one was judged in bf16, as this one was."""
    models = {number: save_vlm(tmp_path / f"stage{number}" / "model") for number in (4, 5)}
    randomize(models[4].projector, seed=8)
    models[4].save_pretrained(tmp_path / "stage4" / "model")
    recipe = dump_recipe(load_recipe("hive-siglip-l-mobilellm-600m"))
    for number, value in ((4, 0.25), (5, 0.75)):
        (tmp_path / f"stage{number}" / "DONE").touch()
        (tmp_path / f"stage{number}" / "recipe.yaml").write_text(recipe)
        judged = load_any(tmp_path / f"stage{number}" / "model", torch.bfloat16)
        scores = [{"name": "accuracy", "value": value, "maximum": 1}]
        found = {"prompt_version": "gqa-2", "samples": 2, "available": 5, "scores": scores}
        file = tmp_path / f"eval{number}" / "results.json"
        file.parent.mkdir()
        record = {"weights_sha256": model_sha256(judged), "vision_encoder_sha256": judged.config.vision_sha256}
        file.write_text(json.dumps({**record, "benchmarks": {"gqa": found}}))
    export_vlm(tmp_path, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| eval5/results.json | gqa | gqa-2 | 2 of 5 | accuracy | 0.75 | 1 |" in card
    assert "0.25" not in card
    for words in ("language model, stages 4 and 5", "data, vlm_alignment", "data, vlm_instruction_tuning"):
        assert f"| {words} | " in card
    export_vlm(tmp_path / "stage4", tmp_path / "aligned")
    assert "vlm_instruction_tuning" not in (tmp_path / "aligned" / "README.md").read_text()
    with pytest.raises(HiveError, match=r"eval4/results.json: its weights_sha256 is \w+; expected \w+ or \w+"):
        export_vlm(tmp_path, tmp_path / "again", scores=tmp_path / "eval4" / "results.json")


@pytest.mark.parametrize("kind", ["chatml", "qwen3", "llama2", "llama3"])
def test_the_chat_template_of_the_folder_writes_texts_as_before(kind: str, tmp_path) -> None:
    tokenizer = prepare_tokenizer(make_tokenizer(kind))
    turns = [Turn("user", "<image>\nOne?"), Turn("assistant", "Two."), Turn("user", "<image>\n<image>\nThree?")]
    parts = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "One?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Two."}]},
        {"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Three?"}]},
    ]
    plain = [{"role": turn.role, "content": turn.content} for turn in turns]
    expected = render_chat(turns, tokenizer, for_answer=True)
    image_processor = PROCESSORS["siglip"]
    own = HiveProcessor(image_processor, tokenizer)
    template = vlm.stock_processor(own, save_vlm(tmp_path, tokenizer=kind).config).chat_template
    for messages in (parts, plain):
        found = tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=True
        )
        assert found == expected


def test_a_prompt_or_a_picture_that_is_read_otherwise_is_refused() -> None:
    pixels = torch.zeros(1, 3, 2, 2)
    theirs = {"input_ids": torch.tensor([[1, 7, 7, 2]]), "pixel_values": pixels}
    ours = {"input_ids": torch.tensor([[1, 2]]), "image_offsets": [[1]], "pixel_values": pixels + 0.9e-3}
    vlm._check_prompt(theirs, ours, 7)
    for wrong, message in (
        (
            {"image_offsets": [[0]]},
            "of a prompt, with the picture at 1; training's are .* at 0: a stock",
        ),
        ({"input_ids": torch.tensor([[1, 3]])}, r"training's are \[1, 3\]"),
        ({"pixel_values": pixels + 1.1e-3}, "makes other pixels of a picture"),
    ):
        with pytest.raises(HiveError, match=message):
            vlm._check_prompt(theirs, ours | wrong, 7)


def test_other_values_of_generation_are_kept(tmp_path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "generation_config.json").write_text('{"max_length": 77, "eos_token_id": 1}')
    tokenizer = prepare_tokenizer(make_tokenizer("chatml"))
    vlm._end_answers(tmp_path / "model", tmp_path, tokenizer)
    found = json.loads((tmp_path / "generation_config.json").read_text())
    assert found == {"max_length": 77, "eos_token_id": end_token_ids(tokenizer, "chat")}


def test_another_answer_is_refused_and_nothing_is_left(tmp_path, monkeypatch) -> None:
    save_vlm(tmp_path / "model")
    copy = vlm._copy_model

    def spoil(folder: Path, aside: Path) -> None:
        copy(folder, aside)
        weights = load_file(aside / "model.safetensors")
        weights["multi_modal_projector.linear_2.bias"] += 1.0
        save_file(weights, aside / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(vlm, "_copy_model", spoil)
    with pytest.raises(HiveError, match="stock transformers answers"):
        export_vlm(tmp_path / "model", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_stock_transformers_does_otherwise_is_refused(tmp_path) -> None:
    save_vlm(tmp_path / "registers", "dinov2_with_registers")
    with pytest.raises(HiveError, match="does not take a dinov2_with_registers encoder's patches"):
        export_vlm(tmp_path / "registers", tmp_path / "out")
    save_hive(tmp_path / "hive")
    with pytest.raises(HiveError, match="holds a hive model; expected a LLaVA-style one"):
        export_vlm(tmp_path / "hive", tmp_path / "out")
    save_vlm(tmp_path / "other")
    make_tokenizer("llama3").save_pretrained(tmp_path / "other")
    with pytest.raises(HiveError, match=r"is token \d+ of its tokenizer, but \d+ of its config"):
        export_vlm(tmp_path / "other", tmp_path / "out")
    save_vlm(tmp_path / "model", tokenizer="wordpiece")  # its template starts with no special token, training does
    with pytest.raises(HiveError, match="a stock Llava cannot use this tokenizer or chat template"):
        export_vlm(tmp_path / "model", tmp_path / "out")
