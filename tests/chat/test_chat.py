"""hive-ds chat: the answers of evaluation, with a history, a stream and a map."""

from __future__ import annotations

import io
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from scene_models import save_scene_model
from tiny_models import tiny_cascaded, tiny_hive
from transformers import BitImageProcessor, SiglipImageProcessor, TextIteratorStreamer

from hive_ds.analysis.attention_pictures import token_name
from hive_ds.chat.answer_maps import answer_maps
from hive_ds.chat.conversation import AnswerSettings, Conversation, read_image
from hive_ds.chat.loading import ChatModel, load_chat_model, template_of
from hive_ds.cli import main
from hive_ds.data.chat import end_token_ids
from hive_ds.data.images import decode_image
from hive_ds.data.scenes_samples import question_samples
from hive_ds.data.schema import Turn
from hive_ds.data.text import render_prompt
from hive_ds.errors import HiveError
from hive_ds.evaluation.generation import answer_samples
from hive_ds.export.source import Source
from hive_ds.model.cascaded import CascadedForCausalLM
from hive_ds.processing import HiveProcessor

SAMPLES = list(question_samples(0, "questions", 3, 64))
SHORT = AnswerSettings(max_new_tokens=6)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose stage 1 learned captions, whose stage 3 is a HIVE model and whose stage 5 is a cascaded one."""
    run = tmp_path_factory.mktemp("run")
    data, stages = {"template": "chat"}, {"connector_pretraining": {"data": {"template": "plain"}}}
    for number in (1, 3, 5):
        (run / f"stage{number}").mkdir()
        (run / f"stage{number}" / "recipe.yaml").write_text(yaml.safe_dump({"data": data, "stages": stages}))
        (run / f"stage{number}" / "DONE").touch()
    _, processor = save_scene_model(run / "stage3" / "model")
    shutil.copytree(run / "stage3" / "model", run / "stage1" / "model")
    cascaded = tiny_cascaded(text_changes={"vocab_size": len(processor.tokenizer)})
    cascaded.save_pretrained(run / "stage5" / "model")
    small = SiglipImageProcessor(size={"height": 32, "width": 32})
    HiveProcessor(small, processor.tokenizer).save_pretrained(run / "stage5" / "model")
    for index, sample in enumerate(SAMPLES):
        (run / f"{index}.png").write_bytes(sample.images[0])
    return run


def shown(chat: Any, *pictures: bytes) -> Conversation:
    conversation = Conversation(chat, SHORT)
    for picture in pictures:
        conversation.show(decode_image(picture))
    return conversation


def test_a_run_a_stage_and_a_model_folder(run: Path) -> None:
    last, third = load_chat_model(run), load_chat_model(run / "stage3")
    assert isinstance(last.model, CascadedForCausalLM)
    assert (last.folder, third.folder) == (run / "stage5" / "model", run / "stage3" / "model")
    assert load_chat_model(run / "stage3" / "model").folder == third.folder
    assert [load_chat_model(run / f"stage{n}").template for n in (1, 3, 5)] == ["plain", "chat", "chat"]
    shutil.copytree(third.folder, run / "alone")
    alone = load_chat_model(run / "alone")
    assert alone.template == "chat"  # its tokenizer has one
    alone.processor.tokenizer.chat_template = None
    assert template_of(Source(alone.folder, ()), alone.processor) == "plain"
    assert "cpu, float32" in str(third) or "cuda" in str(third)


@pytest.mark.parametrize("stage", [3, 5])
def test_answers_are_those_of_evaluation_streamed(run: Path, stage: int) -> None:
    chat = load_chat_model(run / f"stage{stage}")
    expected = answer_samples(chat.model, chat.processor, SAMPLES, template="chat", max_new_tokens=6)
    streamed, beams = [], []
    for sample in SAMPLES:
        streamer = TextIteratorStreamer(chat.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        conversation = shown(chat, *sample.images)
        answer = conversation.ask(sample.turns[0].content, streamer)
        streamed.append((answer.text, "".join(streamer).strip()))
        conversation = shown(chat, *sample.images)
        conversation.settings = AnswerSettings(max_new_tokens=6, beams=3)
        beams.append(conversation.ask(sample.turns[0].content, streamer).text)
    assert streamed == [(text, text) for text in expected]
    assert all(beams)


def test_history_is_kept_and_a_failed_question_is_not(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = load_chat_model(run / "stage3")
    conversation = shown(chat, SAMPLES[0].images[0])
    first = conversation.ask("what is it?")
    conversation.show(decode_image(SAMPLES[1].images[0]))
    with pytest.raises(HiveError, match="question with 2 <image>: expected 1"):
        conversation.ask("<image> or <image>?")
    with pytest.raises(HiveError, match="tokens: expected at most 511"):
        conversation.ask("why? " * 400)
    second = conversation.ask("and this?")
    turns = [Turn("user", "<image>\nwhat is it?"), Turn("assistant", first.text), Turn("user", "<image>\nand this?")]
    assert conversation.turns == [*turns, Turn("assistant", second.text)]
    images = [sample.images[0] for sample in SAMPLES[:2]]
    expected = chat.processor(render_prompt(turns, chat.processor.tokenizer, template="chat"), images)
    assert second.token_ids[0, : second.prompt_length].equal(expected["input_ids"][0])
    assert second.inputs["image_offsets"] == expected["image_offsets"]
    torch.testing.assert_close(second.inputs["pixel_values"], expected["pixel_values"])
    conversation.show(images[0])
    conversation.reset()
    assert conversation.ask("no picture").inputs["image_offsets"] == [[]]
    monkeypatch.setattr(Conversation, "_longest_text", lambda self, inputs: inputs["input_ids"].shape[1])
    with pytest.raises(HiveError, match="tokens: expected at most"):
        conversation.ask("no room for a word of an answer?")


def test_a_cascaded_models_pictures_take_as_many_tokens_as_their_patches(run: Path) -> None:
    """Its processor crops to 4 patches, as DINOv2's crops to less than its config's size; maps show what it sees."""
    processor = HiveProcessor.from_pretrained(run / "stage3" / "model")
    crop = BitImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 16, "width": 16})
    words = {"vocab_size": len(processor.tokenizer), "max_position_embeddings": 48}
    model = tiny_cascaded(vision="dinov2", text_changes=words)
    assert model.config.image_seq_length == 16
    chat = ChatModel(run, model, HiveProcessor(crop, processor.tokenizer), "chat")
    pictures = [sample.images[0] for sample in SAMPLES[:2]]
    answer = shown(chat, *pictures).ask("red?")
    assert answer.prompt_length + 2 * 4 < 48
    assert [picture.size for picture in answer_maps(chat, answer).pictures] == [(32, 32)] * 2  # of 64 x 64
    with pytest.raises(HiveError, match=f"prompt of .* tokens: expected at most {48 - 2 * 4 - 1}"):
        shown(chat, *pictures).ask("why? " * 40)


@pytest.mark.parametrize("kind", ["hive", "cascaded"])
def test_an_answer_ends_where_the_sliding_window_does(run: Path, kind: str) -> None:
    """The model refuses longer texts, in the middle of an answer."""
    tokenizer = HiveProcessor.from_pretrained(run / "stage3" / "model").tokenizer
    changes = {"vocab_size": len(tokenizer), "sliding_window": 40}
    if kind == "hive":
        model, taken = tiny_hive("mistral", text_changes=changes), 0
    else:
        model, taken = tiny_cascaded("mistral", text_changes=changes), 16
    chat = ChatModel(
        run, model, HiveProcessor(SiglipImageProcessor(size={"height": 32, "width": 32}), tokenizer), "chat"
    )
    conversation = Conversation(chat)
    conversation.show(decode_image(SAMPLES[0].images[0]))
    answer = conversation.ask("red?")
    assert answer.prompt_length < answer.token_ids.shape[1] == 40 - taken
    with pytest.raises(HiveError, match=f"expected at most {39 - taken}"):
        shown(chat, SAMPLES[0].images[0]).ask("why? " * 40)


@pytest.mark.parametrize("text", ["{", "a: 1"])
def test_a_damaged_recipe_beside_the_model_is_named(run: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "stage3").mkdir()
    (tmp_path / "stage3" / "recipe.yaml").write_text(text)
    processor = HiveProcessor.from_pretrained(run / "stage3" / "model")
    with pytest.raises(HiveError, match=r"stage3/recipe\.yaml: .*; expected the recipe that training leaves there"):
        template_of(Source(tmp_path / "stage3" / "model", (tmp_path / "stage3",)), processor)


def test_a_model_of_captions_gives_one(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chat = load_chat_model(run / "stage1")
    caption = shown(chat, SAMPLES[0].images[0]).ask("is it red?")
    assert caption.prompt_length == 1  # the question is not read
    conversation = shown(chat, SAMPLES[0].images[0])
    conversation.ask("")
    conversation.show(decode_image(SAMPLES[1].images[0]))
    last = conversation.ask("")
    assert last.images == conversation.ask("").images  # the picture shown last, once more
    assert last.text == shown(chat, SAMPLES[1].images[0]).ask("").text
    assert len(last.images) == 1
    with pytest.raises(HiveError, match="no picture: this model gives captions"):
        Conversation(chat).ask("red?")
    command = ["chat", f"{run}/stage1", "--image", f"{run}/0.png", "--max-new-tokens", "6"]
    assert main([*command, "is it red?"]) == 0
    asked = capsys.readouterr()
    assert main(command) == 0
    assert asked.out == capsys.readouterr().out
    assert asked.out.strip() == caption.text
    assert "the question is not read" in asked.err


def test_answers_end_where_the_template_ends_them(run: Path) -> None:
    tokenizer = HiveProcessor.from_pretrained(run / "stage3" / "model").tokenizer
    closing = tokenizer.convert_tokens_to_ids("<|end|>")
    assert end_token_ids(tokenizer, "chat") == [closing]
    tokenizer.eos_token = "<|pad|>"  # as a base model that has learned the template of another
    assert end_token_ids(tokenizer, "chat") == [tokenizer.eos_token_id, closing]
    assert end_token_ids(tokenizer, "plain") == [tokenizer.eos_token_id]


@pytest.mark.parametrize("stage", [3, 5])
def test_the_map_of_a_token_is_of_the_one_that_predicts_it(run: Path, stage: int) -> None:
    chat = load_chat_model(run / f"stage{stage}")
    answer = shown(chat, SAMPLES[0].images[0], SAMPLES[1].images[0]).ask("what is it?")
    maps = answer_maps(chat, answer)
    whole, *tokens = maps.rows
    first = answer.prompt_length - 1
    assert list(whole.tokens) == [index for row in tokens for index in row.tokens]
    assert list(whole.tokens) == list(range(first, first + len(tokens)))
    said = answer.token_ids[0, answer.prompt_length : answer.prompt_length + len(tokens)]
    assert [row.label for row in tokens] == [token_name(chat.processor.decode([id])) for id in said]
    layers = [layer.layer for layer in maps.maps.layers]
    assert layers == ([1, 3] if stage == 3 else list(range(5)))
    assert maps.panel(0, 0, 1).size == (640, 640)


def test_special_tokens_of_an_answer_have_no_map(run: Path) -> None:
    chat = load_chat_model(run / "stage3")
    answer = shown(chat, SAMPLES[0].images[0]).ask("what is it?")
    tokenizer, start = chat.processor.tokenizer, answer.prompt_length
    end = torch.tensor([end_token_ids(tokenizer, "chat")])
    red, blue = (torch.tensor([tokenizer.encode(word, add_special_tokens=False)[:1]]) for word in ("red", "blue"))

    def rows(*said: torch.Tensor) -> list[tuple[str, list[int]]]:
        ids = torch.cat([answer.token_ids[:, :start], *said], dim=1)
        return [(row.label, list(row.tokens)) for row in answer_maps(chat, replace(answer, token_ids=ids)).rows]

    one, other = (token_name(chat.processor.decode(ids[0])) for ids in (red, blue))
    assert rows(end, red, blue, end) == [
        ("whole answer", [start, start + 1]),
        (one, [start]),
        (other, [start + 1]),
    ]
    assert rows(red, end) == [(one, [start - 1])]
    with pytest.raises(HiveError, match="attention map of an empty answer: the model said nothing"):
        rows(end)


def test_token_names() -> None:
    assert [token_name(text) for text in (" red", "\n", " ", "\x17", "é")] == ["red", r"'\n'", "' '", r"'\x17'", "é"]


def test_the_command_answers_once_or_talks(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = load_chat_model(run / "stage3")
    expected = [shown(chat, SAMPLES[index].images[0]).ask("what is it?").text for index in (0, 1)]
    options = ["--max-new-tokens", "6", "--map", f"{tmp_path}/map.png"]
    assert main(["chat", f"{run}/stage3", "--image", f"{run}/0.png", "what is it?", *options]) == 0
    assert capsys.readouterr().out.strip() == expected[0]
    assert Image.open(tmp_path / "map.png").format == "PNG"
    (tmp_path / "map.png").unlink()
    lines = [f"/image {run}/0.png", "what is it?", "/image none.png", "/reset", "/dance", f"/image {run}/1.png"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join([*lines, "what is it?", "/quit", "what?"])))
    assert main(["chat", f"{run}/stage3", *options]) == 0
    printed = capsys.readouterr()
    assert [line.strip() for line in printed.out.splitlines() if line.strip()] == expected
    assert "error: image none.png: No such file or directory" in printed.err
    assert "error: command /dance: expected /image FILE, /reset or /quit" in printed.err
    assert (tmp_path / "map.png").is_file()


def test_drawn_answers_know_no_penalty_either(run: Path) -> None:
    """A base LLM's own penalty would count other tokens in HIVE models than in LLaVA-style ones."""
    chat = load_chat_model(run / "stage3")
    settings = AnswerSettings(max_new_tokens=12, temperature=0.7)
    said = []
    for penalty in (1.0, 50.0):
        chat.model.generation_config.repetition_penalty = penalty
        conversation = Conversation(chat, settings)
        conversation.show(decode_image(SAMPLES[0].images[0]))
        torch.manual_seed(0)
        said.append(conversation.ask("what is this?").token_ids.tolist())
    assert said[0] == said[1]


def test_a_seed_draws_the_same_answers_again(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["chat", f"{run}/stage3", "--image", f"{run}/0.png", "what is it?", "--max-new-tokens", "8"]
    said = []
    for seed in ("0", "0", "1"):
        assert main([*command, "--temperature", "2", "--seed", seed]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != said[2]
    for wrong in ("-1", str(1 << 63)):
        assert main([*command, "--seed", wrong]) == 2
        assert f"seed is {wrong}, expected from 0 to 2**63 - 1" in capsys.readouterr().err


def test_wrong_input(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(HiveError, match=r"text\.png: image of 10 bytes cannot be read"):
        read_image(tmp_path / "text.png")
    with pytest.raises(HiveError, match="holds neither a model"):
        load_chat_model(tmp_path)
    two = Conversation(ChatModel(tmp_path, None, None, "chat"), shown=[Image.new("RGB", (8, 8))] * 2)  # type: ignore[arg-type]
    with pytest.raises(HiveError, match="question with 1 <image>: expected 2, one for each picture shown"):
        two.ask("is <image> red?")
    for wrong in ({"max_new_tokens": 0}, {"temperature": -0.5}, {"temperature": float("nan")}, {"beams": 0}):
        with pytest.raises(HiveError, match="expected at least"):
            AnswerSettings(**wrong)
