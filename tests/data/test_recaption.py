"""New captions by captioners of several kinds, restarted where they were killed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from corpus import PICTURES_ALONE
from tiny_data import make_samples, make_tokenizer

from hive_ds.cli import main
from hive_ds.data.images import decode_image
from hive_ds.data.mds import read_mds, write_mds
from hive_ds.data.recaption import Captioner, CaptionerSettings
from hive_ds.data.schema import Sample

SIZE = 16


def save_blip(folder: Path) -> None:
    words = [
        *["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"],
        "a",
        "picture",
        "of",
        "red",
        "blue",
        "square",
        "circle",
        "left",
    ]
    (folder / "vocab.txt").write_text("\n".join(words))
    tokenizer = transformers.BertTokenizerFast.from_pretrained(folder)
    size = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**size, "vocab_size": len(words), "encoder_hidden_size": 32, "max_position_embeddings": 64}
    ids = {"bos_token_id": 2, "sep_token_id": 3, "eos_token_id": 3, "pad_token_id": 0}
    config = transformers.BlipConfig(
        text_config={**text, **ids}, vision_config={**size, "image_size": SIZE, "patch_size": 8}, projection_dim=32
    )
    images = transformers.BlipImageProcessor(size={"height": SIZE, "width": SIZE})
    transformers.BlipProcessor(images, tokenizer).save_pretrained(folder)
    save_random(transformers.BlipForConditionalGeneration(config), folder)


def save_llava(folder: Path) -> None:
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=make_tokenizer("llama3").backend_tokenizer,
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        pad_token="<|eot_id|>",
        additional_special_tokens=["<image>"],
        model_input_names=["input_ids", "attention_mask"],
    )
    template = (
        "{% for m in messages %}{% for c in m['content'] %}"
        "{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] }}{% endif %}"
        "{% endfor %}{% endfor %} ASSISTANT:"
    )
    size = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**size, image_size=SIZE, patch_size=8),
        text_config=transformers.LlamaConfig(
            **size,
            vocab_size=len(tokenizer),
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
    )
    images = transformers.CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    transformers.LlavaProcessor(
        images,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    ).save_pretrained(folder)
    save_random(transformers.LlavaForConditionalGeneration(config), folder)


def save_florence(folder: Path) -> None:
    tokenizer = transformers.BartTokenizerFast(
        tokenizer_object=make_tokenizer("llama3").backend_tokenizer,
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        pad_token="<|eot_id|>",
        extra_special_tokens={"image_token": "<image>"},
    )
    vision = {
        **{"depths": (1, 1), "patch_size": (7, 3), "patch_stride": (4, 2), "patch_padding": (3, 1), "window_size": 2},
        **{"patch_prenorm": (False, True), "embed_dim": (16, 32), "num_heads": (2, 2), "num_groups": (2, 2)},
    }
    text = {
        **{"d_model": 32, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "encoder_layers": 1, "decoder_layers": 1},
        **{"encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": len(tokenizer)},
        **{name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
        **{"decoder_start_token_id": tokenizer.eos_token_id, "forced_eos_token_id": None},
    }
    config = transformers.Florence2Config(
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_config={**vision, "projection_dim": 32},
        text_config={"model_type": "bart", **text},
    )
    images = transformers.CLIPImageProcessor(size={"height": SIZE, "width": SIZE}, do_center_crop=False)
    images.image_seq_length = 5  # 2 x 2 patches and their mean
    transformers.Florence2Processor(images, tokenizer).save_pretrained(folder)
    save_random(transformers.Florence2ForConditionalGeneration(config), folder)


def save_random(model: transformers.PreTrainedModel, folder: Path) -> None:
    """Weights large enough that captions differ from picture to picture."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.6)
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def captioners(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in ("blip", "llava", "florence")}
    save_blip(folders["blip"])
    save_llava(folders["llava"])
    save_florence(folders["florence"])
    return {kind: str(folder) for kind, folder in folders.items()}


def run(folder: Path, out: Path, captioner: str, *options: str) -> int:
    fixed = ["--batch-size", "4", "--max-new-tokens", "6", "--device", "cpu"]
    return main(["data", "recaption", str(folder), str(out), "--captioner", captioner, *fixed, *options])


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def expected_caption(sample: Sample, captioner: Captioner) -> str:
    return " ".join(captioner([decode_image(image)])[0] for image in sample.images)


@pytest.mark.parametrize(
    ("kind", "prompt"), [("blip", None), ("blip", "A picture of"), ("llava", "What is it?"), ("florence", "<CAPTION>")]
)
def test_captions_are_the_models_own(
    kind: str, prompt: str | None, captioners: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = make_samples(13, bad=(2, 6))
    write_mds(samples, tmp_path / "data")
    options = ["--prompt", prompt] if prompt else []
    assert run(tmp_path / "data", tmp_path / "out.jsonl", captioners[kind], *options) == 0
    found = lines(tmp_path / "out.jsonl")
    assert any(line["caption"] for line in found)
    alone = Captioner(CaptionerSettings(captioners[kind], prompt, 6, "cpu"))
    assert alone._model.dtype == torch.float32
    with_images = [sample for sample in samples if sample.images and sample.id not in ("s002", "s006")]
    assert found == [
        {
            "id": sample.id,
            "caption": expected_caption(sample, alone),
            "captioner": captioners[kind],
            "prompt": prompt,
        }
        for sample in with_images
    ]
    captions = [line["caption"] for line in found]
    assert len(set(captions)) > 1
    assert not any(caption.lower().startswith((prompt or "?").lower()) for caption in captions)
    assert not any(mark in caption for caption in captions for mark in ("ASSISTANT", "[CLS]", "<|"))
    said = capsys.readouterr().out
    assert (
        f"{len(found)} captions written, 0 were there, 2 without image, 2 unreadable (the first, number 2: image of"
        in said
    )


def test_samples_of_one_id_are_counted(
    captioners: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = [sample for sample in make_samples(13) if sample.images][:4]
    samples += samples[2:3]
    ids = ("s0", "s1", "s2", "s0", "s2")
    write_mds([replace(sample, id=id) for id, sample in zip(ids, samples, strict=True)], tmp_path / "data")
    said = []
    for _ in range(2):
        assert run(tmp_path / "data", tmp_path / "out.jsonl", captioners["blip"]) == 0
        said.append(capsys.readouterr().out)
    repeated = ", 2 with the id of an earlier sample and its caption, 1 of them with other pictures: expected ids ("
    assert "3 captions written, 0 were there" in said[0]
    assert "0 captions written, 3 were there" in said[1]
    assert all(repeated in text for text in said)


@pytest.mark.parametrize("kind", PICTURES_ALONE)
def test_pictures_alone_become_captioned_shards(
    kind: str, captioners: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, ids = PICTURES_ALONE[kind](tmp_path / "source")
    out, shards = tmp_path / "out.jsonl", tmp_path / "data"
    images = ["--images", str(tmp_path / "source")] if kind == "llava" else []
    assert run(path, out, captioners["blip"], *images) == 0
    assert main(["data", "convert", str(path), str(shards), "--captions", str(out), *images]) == 0
    alone = Captioner(CaptionerSettings(captioners["blip"], None, 6, "cpu"))
    samples = read_mds(shards)
    assert [sample.id for sample in samples] == ids
    for number, sample in enumerate(samples):
        assert sample.images == ((tmp_path / "source" / f"{number}.jpg").read_bytes(),)
        assert sample.turns[1].content == expected_caption(sample, alone)
    (tmp_path / "source" / "bad.jpg").write_bytes(b"no picture")
    if kind == "folder":
        capsys.readouterr()
        assert run(path, out, captioners["blip"]) == 0
        assert "1 unreadable (the first, number 3: " in capsys.readouterr().out


def test_restart_does_what_is_missing(captioners: dict[str, str], tmp_path: Path) -> None:
    write_mds(make_samples(13), tmp_path / "data")
    out = tmp_path / "out.jsonl"
    assert run(tmp_path / "data", out, captioners["blip"]) == 0
    whole = out.read_bytes()
    for cut in (0, 5, whole.index(b"\n") + 1, len(whole) // 2, len(whole) - 1, len(whole)):
        out.write_bytes(whole[:cut].replace(b'"caption": "', b'"caption": "kept '))
        kept = whole[:cut].count(b"\n")
        assert run(tmp_path / "data", out, captioners["blip"]) == 0
        assert [line["id"] for line in lines(out)] == [json.loads(line)["id"] for line in whole.splitlines()]
        assert [line["caption"].startswith("kept ") for line in lines(out)] == [
            number < kept for number in range(len(lines(out)))
        ]
    assert run(tmp_path / "data", out, captioners["blip"], "--prompt", "A picture of") == 2, "a file has one prompt"


@pytest.mark.parametrize(
    ("content", "kind", "options", "says"),
    [
        (None, "none", [], "captioner {model}: cannot be loaded on cpu"),
        (None, "llava", [], "is a chat model, expected --prompt"),
        (None, "blip", ["--dtype", "fp16"], "dtype 'fp16': expected one of bf16, fp32"),
        (None, "blip", ["--max-new-tokens", "0"], "max-new-tokens is 0, expected at least 1"),
        (None, "blip", ["--batch-size", "0"], "batch-size is 0, expected at least 1"),
        ('{"id": "a"}\n', "blip", [], "out.jsonl line 1: expected JSON with id, caption, captioner and prompt"),
        ('{"id": "a", "caption": "", "captioner": "x", "prompt": null}\n', "blip", [], "line 1: comes from"),
    ],
)
def test_wrong_input_is_one_line_and_leaves_the_file(
    content: str | None,
    kind: str,
    options: list[str],
    says: str,
    captioners: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_mds(make_samples(3), tmp_path / "data")
    out, model = tmp_path / "out.jsonl", captioners.get(kind, str(tmp_path / "none"))
    if content:
        out.write_text(content)
    capsys.readouterr()
    assert run(tmp_path / "data", out, model, *options) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert says.format(model=model) in said
    assert (out.read_text() if out.exists() else None) == content


def test_half_precision_runs(captioners: dict[str, str], tmp_path: Path) -> None:
    write_mds(make_samples(3), tmp_path / "data")
    assert run(tmp_path / "data", tmp_path / "out.jsonl", captioners["blip"], "--dtype", "bf16") == 0
    assert [line["id"] for line in lines(tmp_path / "out.jsonl")] == ["s000", "s001", "s002"]
    settings = CaptionerSettings(captioners["blip"], device="cpu", dtype="bf16")
    assert Captioner(settings)._model.dtype == torch.bfloat16
