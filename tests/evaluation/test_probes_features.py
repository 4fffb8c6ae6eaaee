"""Features equal plain transformers' hidden states; the cache gives back the same bits, or nothing."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from probe_data import PROCESSORS, encoder, labelled, noise_png
from safetensors.torch import load_file, save_file
from scene_models import save_scene_model
from tiny_models import tiny_encoder

from hive_ds.data.images import decode_image
from hive_ds.errors import HiveError
from hive_ds.evaluation.probes import features as features_module
from hive_ds.evaluation.probes.cache import ASIDE, EntryWriter, FeatureCache
from hive_ds.evaluation.probes.data import LabelledImages
from hive_ds.evaluation.probes.encoder import ProbeEncoder, load_encoder, make_encoder
from hive_ds.evaluation.probes.features import ExtractSettings, compute_features
from hive_ds.export import export_encoder
from hive_ds.model.vision import vision_blocks

QUIET = ExtractSettings(batch_size=4, progress=False)
IMAGES = labelled("noise", 10)


def never(*_: object, **__: object) -> None:
    raise AssertionError("the encoder ran")


@pytest.mark.parametrize("family", PROCESSORS)
def test_features_equal_plain_transformers(family: str) -> None:
    ours = encoder(family)
    tokens, means = (compute_features(ours, IMAGES, (1, 3, 4), kind, QUIET) for kind in ("tokens", "mean"))
    pictures = [decode_image(IMAGES.read(index)) for index in range(IMAGES.size)]
    inputs = PROCESSORS[family](pictures, return_tensors="pt")
    with torch.no_grad():
        stock = tiny_encoder(family)(**inputs, output_hidden_states=True).hidden_states
    mask = inputs.get("pixel_attention_mask")
    patches = 16 if mask is None else mask.shape[1]
    counts = [patches] * IMAGES.size if mask is None else mask.sum(1).tolist()
    for block in (1, 3, 4):
        assert tokens[block].values.shape == (IMAGES.size, patches, 32)
        assert tokens[block].counts.tolist() == counts
        for index, count in enumerate(counts):
            expected = stock[block][index, stock[block].shape[1] - patches :][:count]
            torch.testing.assert_close(torch.from_numpy(tokens[block].values[index, :count]), expected)
            torch.testing.assert_close(torch.from_numpy(means[block].values[index]), expected.mean(0))
            assert not tokens[block].values[index, count:].any()
    assert family != "siglip2" or len(set(counts)) > 1  # pictures of unequal shapes have unequal numbers of patches


@pytest.mark.parametrize("kind", ["mean", "tokens"])
def test_cached_features_are_the_same_bits(kind: str, tmp_path: Path, monkeypatch) -> None:
    probed, cache = encoder("siglip2"), FeatureCache(tmp_path / "cache")
    fresh = compute_features(probed, IMAGES, (1, 2, 4), kind, QUIET)
    first = compute_features(probed, IMAGES, (2, 4), kind, QUIET, cache)
    workers = replace(QUIET, workers=2, batch_size=4)
    both = compute_features(probed, IMAGES, (1, 2, 4), kind, workers, FeatureCache(tmp_path / "cache"))
    monkeypatch.setattr(features_module, "encode_images", never)
    read = compute_features(probed, IMAGES, (4, 1, 2), kind, QUIET, cache)
    for found in (first, both, read):
        for block, one in found.items():
            assert isinstance(one.values, np.memmap)
            assert one.values.tobytes() == fresh[block].values.tobytes()
            assert (one.counts is None) == (kind == "mean")
            assert one.counts is None or one.counts.tolist() == fresh[block].counts.tolist()
    assert len(list((tmp_path / "cache").iterdir())) == 3


def test_whatever_changes_features_is_another_entry(tmp_path: Path, monkeypatch) -> None:
    cache, probed = FeatureCache(tmp_path), encoder()
    compute_features(probed, IMAGES, (2,), "mean", QUIET, cache)
    fewer_heads = tiny_encoder()
    for block in vision_blocks(fewer_heads):
        block.self_attn.num_heads, block.self_attn.head_dim = 2, 16
    fewer_heads.config.num_attention_heads = 2
    fewer = make_encoder(fewer_heads, PROCESSORS["siglip"], "fewer heads", device="cpu")
    assert fewer.info.weights_sha256 == probed.info.weights_sha256
    other_processor = replace(probed, info=replace(probed.info, processor_sha256="0" * 64))
    nudged = tiny_encoder()
    with torch.no_grad():
        for weight in nudged.parameters():
            weight.copy_(weight.bfloat16())
    rounded = make_encoder(nudged, PROCESSORS["siglip"], "rounded", device="cpu")
    assert rounded.info.weights_sha256 == probed.info.weights_sha256
    others = {
        "weights": (encoder(seed=1), IMAGES, 2, "mean", QUIET),
        "weights below bf16": (rounded, IMAGES, 2, "mean", QUIET),
        "config": (fewer, IMAGES, 2, "mean", QUIET),
        "processor": (other_processor, IMAGES, 2, "mean", QUIET),
        "number type": (encoder(dtype="bf16"), IMAGES, 2, "mean", QUIET),
        "images": (probed, labelled("noise", 10, first=1), 2, "mean", QUIET),
        "block": (probed, IMAGES, 1, "mean", QUIET),
        "kind": (probed, IMAGES, 2, "tokens", QUIET),
        "stored": (probed, IMAGES, 2, "mean", replace(QUIET, stored="fp16")),
    }
    for count, (probed_so, images, block, kind, settings) in enumerate(others.values(), start=2):
        compute_features(probed_so, images, (block,), kind, settings, cache)
        assert len(list(tmp_path.iterdir())) == count
    renamed = replace(encoder(), info=replace(probed.info, name="other", source="elsewhere"))
    relabelled = replace(IMAGES, name="other", labels={})
    monkeypatch.setattr(features_module, "encode_images", never)
    compute_features(renamed, relabelled, (2,), "mean", replace(QUIET, batch_size=3), cache)


def with_reader(read) -> LabelledImages:
    return replace(IMAGES, read=read)


@pytest.mark.parametrize("moment", ["half of the images", "before the rename"])
def test_killed_in_mid_write_leaves_nothing_that_is_read(moment: str, tmp_path: Path, monkeypatch) -> None:
    probed = encoder()

    def kill() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def killing(index: int) -> bytes:
        return kill() if index == 7 and moment == "half of the images" else IMAGES.read(index)

    with monkeypatch.context() as patched:
        patched.setattr(EntryWriter, "_publish", lambda _: kill())
        arguments = (probed, with_reader(killing), (1, 3), "tokens", QUIET, FeatureCache(tmp_path))
        process = multiprocessing.get_context("fork").Process(target=compute_features, args=arguments)
        process.start()
        process.join(60)
    assert process.exitcode == -signal.SIGKILL
    fresh = compute_features(probed, IMAGES, (1, 3), "tokens", QUIET)
    left = list(tmp_path.iterdir())
    assert [path.name.startswith(ASIDE) for path in left] == [True, True]
    sizes = [(path / "features.npy").stat().st_size for path in left]
    assert (max(sizes) > fresh[1].values.nbytes) == (moment == "before the rename")
    cache = FeatureCache(tmp_path)
    assert list(tmp_path.iterdir()) == []
    after = compute_features(probed, IMAGES, (1, 3), "tokens", QUIET, cache)
    assert all(after[block].values.tobytes() == fresh[block].values.tobytes() for block in (1, 3))


def test_what_a_living_process_writes_is_left_alone(tmp_path: Path) -> None:
    """A second process that opens the cache in mid-write removes nothing, and may be faster with the same entry."""
    seen = []

    def opening(index: int) -> bytes:
        if index == 9:
            FeatureCache(tmp_path)
            seen.extend(path.name for path in tmp_path.iterdir())
            compute_features(encoder(), IMAGES, (2,), "mean", QUIET, FeatureCache(tmp_path))
        return IMAGES.read(index)

    found = compute_features(encoder(), with_reader(opening), (2,), "mean", QUIET, FeatureCache(tmp_path))
    assert [name.startswith(ASIDE) for name in seen] == [True]
    assert len(list(tmp_path.iterdir())) == 1
    assert found[2].values.tobytes() == compute_features(encoder(), IMAGES, (2,), "mean", QUIET)[2].values.tobytes()


@pytest.mark.parametrize("damage", ["cut", "no meta", "another key", "no counts"])
def test_damaged_entries_are_computed_again(damage: str, tmp_path: Path) -> None:
    cache, probed = FeatureCache(tmp_path), encoder()
    whole = compute_features(probed, IMAGES, (2,), "tokens", QUIET, cache)[2].values.tobytes()
    (entry,) = tmp_path.iterdir()
    if damage == "cut":
        data = (entry / "features.npy").read_bytes()
        (entry / "features.npy").write_bytes(data[: len(data) // 2])
    elif damage == "no meta":
        (entry / "meta.json").unlink()
    elif damage == "no counts":
        (entry / "counts.npy").unlink()
    else:
        meta = json.loads((entry / "meta.json").read_text())
        meta["key"]["weights"] = "other"
        (entry / "meta.json").write_text(json.dumps(meta))
    assert compute_features(probed, IMAGES, (2,), "tokens", QUIET, cache)[2].values.tobytes() == whole
    assert cache.find(features_module._key(probed, IMAGES, 2, "tokens", QUIET)) is not None


@pytest.mark.usefixtures("forkserver_by_default")  # which could not be sent the functions below
@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_is_named_and_nothing_is_cached(workers: int, tmp_path: Path) -> None:
    def broken(index: int) -> bytes:
        return b"no picture" if index == 6 else noise_png(index)

    settings = replace(QUIET, workers=workers)
    with pytest.raises(HiveError, match=r"^noise: image 6: image of 10 bytes cannot be read: no known image format$"):
        compute_features(encoder(), with_reader(broken), (1, 2), "mean", settings, FeatureCache(tmp_path))

    def missing(index: int) -> bytes:
        return (tmp_path / f"{index}.png").read_bytes()

    with pytest.raises(HiveError, match=r"^noise: image 0: .*0\.png"):
        compute_features(encoder(), with_reader(missing), (1,), "mean", settings, FeatureCache(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_said_before_it_is_full(tmp_path: Path, monkeypatch) -> None:
    usage = namedtuple("usage", "total used free")(1000, 0, 1000)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(HiveError, match=r"block 2 needs 0\.0 GB, 0\.0 GB are free"):
        compute_features(encoder(), IMAGES, (2,), "mean", QUIET, FeatureCache(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_half_precision_is_rounding_or_an_error() -> None:
    probed = encoder()
    exact = compute_features(probed, IMAGES, (4,), "tokens", QUIET)[4].values
    half = compute_features(probed, IMAGES, (4,), "tokens", replace(QUIET, stored="fp16"))[4].values
    assert half.dtype == np.float16
    assert np.array_equal(half, exact.astype(np.float16))
    with torch.no_grad():
        vision_blocks(probed.tower)[1].mlp.fc2.bias[3] = 1e5
    assert np.isfinite(compute_features(probed, IMAGES, (2,), "mean", QUIET)[2].values).all()
    with pytest.raises(HiveError, match="block 2: not finite as fp16"):
        compute_features(probed, IMAGES, (2,), "mean", replace(QUIET, stored="fp16"))


def test_blocks_that_are_not_there() -> None:
    with pytest.raises(HiveError, match="block 5 of siglip-0: expected 1 to 4"):
        compute_features(encoder(), IMAGES, (1, 5), "mean", QUIET)


def features_of(probed: ProbeEncoder) -> bytes:
    return compute_features(probed, IMAGES, (3,), "mean", QUIET)[3].values.tobytes()


def test_a_model_a_run_and_the_exported_encoder_are_one(tmp_path: Path) -> None:
    run = tmp_path / "run"
    model, _ = save_scene_model(run / "stage3" / "model")
    (run / "stage3" / "DONE").touch()
    export_encoder(run, tmp_path / "out")
    sources = (run, run / "stage3" / "model", tmp_path / "out")
    found = [load_encoder(source, device="cpu") for source in sources]
    assert [one.info.name for one in found] == ["run", "model", "out"]
    assert len({replace(one.info, name="", source="") for one in found}) == 1
    assert len({features_of(one) for one in found}) == 1
    name, parameter = next(model.vision_encoder.named_parameters())
    assert torch.equal(dict(found[0].tower.named_parameters())[name], parameter)


def test_incomplete_weights_are_refused(tmp_path: Path) -> None:
    save_scene_model(tmp_path / "model")
    export_encoder(tmp_path / "model", tmp_path / "out")
    for folder, reason in (("out", "lacks 1 weights of its tower"), ("model", "not hold its vision encoder: missing")):
        weights = load_file(tmp_path / folder / "model.safetensors")
        weights.pop(next(name for name in weights if name.endswith("layers.2.mlp.fc2.weight")))
        save_file(weights, tmp_path / folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(HiveError, match=reason):
            load_encoder(tmp_path / folder)
    with pytest.raises(HiveError, match="holds neither a model"):
        load_encoder(tmp_path)
    with pytest.raises(HiveError, match="does not exist"):
        load_encoder(tmp_path / "none")
