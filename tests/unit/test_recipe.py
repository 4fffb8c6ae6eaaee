from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from hive_ds.config import STAGE_NAMES, VlmConfig
from hive_ds.errors import HiveError
from hive_ds.recipe import RECIPES, load_recipe, recipe_names, resolve

PAPER = "hive-siglip-l-mobilellm-600m"

# The stages of arXiv 2604.00086 and its published scripts:
# lr, floor of the cosine, betas, decay, clip, global batch, epochs.
PAPER_STAGES = {
    "connector_pretraining": (1e-3, 0.1, (0.9, 0.999), 1e-5, 1.0, 256, 0.2),
    "modality_adaptation": (1e-4, 0.1, (0.9, 0.95), 1e-5, 0.6, 1024, 1),
    "vision_finetuning": (5e-6, 0.0, (0.9, 0.95), 1e-5, 0.8, 1024, 1),
    "vlm_alignment": (1e-3, 0.0, (0.9, 0.999), 0.0, 1.0, 256, 1),
    "vlm_instruction_tuning": (2e-5, 0.0, (0.9, 0.999), 0.0, 1.0, 64, 1),
}


def test_paper_recipe_has_the_papers_figures():
    recipe = load_recipe(PAPER)
    assert recipe.model.vision_encoder == "google/siglip-large-patch16-384"
    assert recipe.model.language_model == "facebook/MobileLLM-600M"
    assert recipe.model.routes.vision_blocks == (2, 5, 8, 11, 14, 17, 20, 23)
    assert recipe.model.routes.language_layers == (4, 9, 14, 19, 24, 29, 34, 39)
    assert (recipe.model.qk_norm, recipe.model.rope) == ("post_rope", "2d")
    assert (recipe.data.template, recipe.data.max_length) == ("plain", 2048)
    assert recipe.training.precision == "bf16"
    assert {
        name: (s.lr, s.min_lr_ratio, s.betas, s.weight_decay, s.clip, s.global_batch_size, s.epochs)
        for name, s in recipe.stages.items()
    } == PAPER_STAGES
    for stage in recipe.stages.values():
        assert (stage.warmup_ratio, stage.steps, stage.group_lr, stage.vision_layer_decay) == (0.03, None, {}, 1.0)
    assert recipe.vlm is not None
    assert recipe.vlm == VlmConfig("Qwen/Qwen2-0.5B-Instruct", vision_encoder=None, feature_block=-2)
    data = {name: recipe.data_of(name) for name in STAGE_NAMES}
    assert [data[name] == recipe.data for name in STAGE_NAMES] == [True, True, True, False, False]
    assert [(data[name].train, data[name].template) for name in STAGE_NAMES[3:]] == [
        ("data/llava-pretrain", "plain"),
        ("data/llava-next", "chat"),
    ]
    assert all(one.max_length == 2048 for one in data.values())


def test_baselines_differ_in_what_makes_them_baselines():
    """Same stages, data and seeds as HIVE's recipe; the origins say what each file itself sets."""
    own = {}
    for name in ("sa-siglip-l-mobilellm-600m", "base-siglip-l", "last-siglip-l-mobilellm-600m"):
        recipe, origins = resolve(name)
        own[name.split("-")[0]] = {key for key, origin in origins.items() if origin.startswith(name)} - {
            "name",
            "description",
        }
        assert (recipe.data, recipe.training) == (load_recipe(PAPER).data, load_recipe(PAPER).training)
    clips = {f"stages.{name}.clip" for name in STAGE_NAMES[:3]}
    assert own == {
        "sa": {"model.kind", "model.routes", "model.feature_block", *clips},
        "base": {"vlm.vision_encoder"},
        "last": {"model.routes.vision_blocks"},
    }
    assert tuple(load_recipe("base-siglip-l").stages) == STAGE_NAMES[3:]
    assert {load_recipe("sa-siglip-l-mobilellm-600m").stages[name].clip for name in STAGE_NAMES} == {1.0}
    routes = load_recipe("last-siglip-l-mobilellm-600m").model.routes
    assert routes is not None
    assert set(routes.vision_blocks) == {24}


def test_data_of_a_stage_lies_over_the_recipes():
    overrides = ["data.train={a: 1, b: 2}", "data.max_length=99", "stages.vlm_alignment.data={train: {c: 1}}"]
    recipe, origins = resolve("tiny", overrides)
    found = recipe.data_of("vlm_alignment")
    assert found == replace(recipe.data, train={"c": 1.0})
    assert recipe.data_of("vlm_instruction_tuning") is recipe.data
    assert origins["stages.vlm_alignment.data.max_length"] == "--set"
    assert origins["stages.vlm_alignment.data.template"] == origins["data.template"]


def test_model_that_judges_the_encoder():
    """Its own language model and block; all else is the model's that trains the encoder."""
    recipe = load_recipe("tiny", ["vlm={language_model: chat, feature_block: -1}", "model.rope=1d"])
    found, own = recipe.vlm_model("encoder"), {"vision_encoder": "encoder", "feature_block": -1}
    own |= {"kind": "cascaded", "routes": None, "language_model": "chat"}
    assert found == replace(recipe.model, **own)


def test_an_encoder_that_no_stage_trains_has_to_be_named():
    with pytest.raises(HiveError, match=r"vlm\.vision_encoder is null, but no stage trains an encoder; expected"):
        load_recipe("tiny-base", ["vlm.vision_encoder=null"])


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipe(name: str):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.description
    assert tuple(recipe.stages) == (STAGE_NAMES if "base" not in name else STAGE_NAMES[3:])
    comments = _comments(name)
    parts = [recipe.model.vision_encoder, recipe.model.language_model]
    for part in [*parts, recipe.vlm.language_model] if recipe.vlm else parts:
        if not part.startswith("runs/"):
            assert re.search(rf"{re.escape(part)}\s+(Apache-2\.0|MIT|FAIR Noncommercial)", comments), part


def _comments(name: str) -> str:
    """Comments of a recipe and of those that it is based on."""
    lines = (RECIPES / f"{name}.yaml").read_text().splitlines()
    bases = [line.removeprefix("base: ") for line in lines if line.startswith("base: ")]
    return "\n".join([*(line for line in lines if line.startswith("#")), *map(_comments, bases)])


def test_precedence_and_origins(tmp_path: Path):
    (tmp_path / "base.yaml").write_text("base: tiny\nname: b\ntraining:\n  seed: 1\n  log_interval: 2\n  wandb: true\n")
    child = tmp_path / "sub" / "child.yaml"
    child.parent.mkdir()
    child.write_text("base: ../base.yaml\nname: c\ntraining:\n  seed: 2\n  log_interval: 3\n")
    recipe, origins = resolve(child, ["training.seed=3", "training.seed=4"])
    training = recipe.training
    assert (training.seed, training.log_interval, training.wandb, training.tensorboard) == (4, 3, True, False)
    assert {
        key.removeprefix("training."): origin for key, origin in origins.items() if key.startswith("training.")
    } == {
        "seed": "--set",
        "log_interval": f"{child}:5",
        "wandb": "base ../base.yaml:6",
        "precision": "base tiny.yaml:" + _line("tiny", "  precision:"),
        "checkpoint_interval": "base tiny.yaml:" + _line("tiny", "  checkpoint_interval:"),
        "tensorboard": "default",
        "compile": "default",
        "ds_config": "default",
        "validation_interval": "base tiny.yaml:" + _line("tiny", "  validation_interval:"),
        "validation_samples": "base tiny.yaml:" + _line("tiny", "  validation_samples:"),
        "maps_interval": "default",
        "profile": "default",
        "max_skipped_steps": "default",
        "keep_checkpoints": "default",
        "keep_every": "default",
        "stop_on_failed_save": "default",
        "hang_timeout": "default",
    }
    assert origins["name"] == f"{child}:2"


def _line(recipe: str, start: str) -> str:
    lines = (RECIPES / f"{recipe}.yaml").read_text().splitlines()
    return str(next(number for number, line in enumerate(lines, 1) if line.startswith(start)))


@pytest.mark.parametrize(
    ("override", "read", "expected"),
    [
        ("stages.vision_finetuning.lr=1e-3", lambda r: r.stages["vision_finetuning"].lr, 0.001),
        ("stages.vision_finetuning.lr=2", lambda r: r.stages["vision_finetuning"].lr, 2.0),
        ("stages.vision_finetuning.betas=[9e-1, .5]", lambda r: r.stages["vision_finetuning"].betas, (0.9, 0.5)),
        ("stages.vision_finetuning.steps=null", lambda r: r.stages["vision_finetuning"].steps, None),
        (
            "stages.vision_finetuning.group_lr={qk_norms: 1e-4, language_model: 0}",
            lambda r: r.stages["vision_finetuning"].group_lr,
            {"qk_norms": 1e-4, "language_model": 0.0},
        ),
        (
            "stages.vision_finetuning.group_lr.image_kv=1e-4",
            lambda r: r.stages["vision_finetuning"].group_lr,
            {"image_kv": 1e-4},
        ),
        ("training.seed=9223372036854775807", lambda r: r.training.seed, 2**63 - 1),
        ("stages.vision_finetuning=null", lambda r: tuple(r.stages), STAGE_NAMES[:2] + STAGE_NAMES[3:]),
        ("training.profile=[3, 5]", lambda r: r.training.profile, (3, 5)),
        ("data.validation=", lambda r: r.data.validation, None),
        ("data.validation=2024", lambda r: r.data.validation, "2024"),
        ("data.train={a/b: 1, 's3://c': 0.5}", lambda r: r.data.train, {"a/b": 1.0, "s3://c": 0.5}),
        ("data.cache_limit=1.5TB", lambda r: r.data.cache_limit, "1.5TB"),
        ("name=no", lambda r: r.name, "no"),
        ("name='null'", lambda r: r.name, "null"),
        ("data.shuffle=no", lambda r: r.data.shuffle, False),
        (
            "model.routes={vision_blocks: [1, 1], language_layers: [2, 3]}",
            lambda r: r.model.routes.vision_blocks,
            (1, 1),
        ),
    ],
)
def test_set(override: str, read, expected):
    value = read(load_recipe("tiny", [override]))
    assert value == expected
    assert type(value) is type(expected)


BAD_VALUES = {
    "model.qk_norm=pre-rope": "model.qk_norm = pre-rope (--set): expected one of none, pre_rope, post_rope; did you"
    " mean pre_rope?",
    "stages.vision_finetuning.lr=-1e-3": "stages.vision_finetuning.lr = -1e-3 (--set): expected a number, > 0",
    "training.profile=[3, 2]": "training.profile = [3, 2] (--set): expected a list of 2 values, each a whole number or"
    " null, the first >= 1, the last not below it",
    "training.profile=[0, 2]": "the first >= 1",
    "stages.vision_finetuning.lr=0": "expected a number, > 0",
    "stages.vision_finetuning.lr=nan": "expected a number",
    "stages.vision_finetuning.lr=.inf": "expected a number",
    "stages.vision_finetuning.lr=fast": "expected a number",
    "stages.vision_finetuning.min_lr_ratio=1.5": "expected a number, from 0 to 1",
    "stages.vision_finetuning.betas=[0.9, 1]": "expected a list of 2 values",
    "stages.vision_finetuning.betas=[0.9]": "expected a list of 2 values",
    "stages.vision_finetuning.group_lr={projectors: -1}": "group_lr = {projectors: -1}",
    "stages.vision_finetuning.group_lr={vision_encodr: 0}": "unknown key stages.vision_finetuning.group_lr.vision_"
    "encodr = 0 (--set); did you mean vision_encoder?",
    "stages.vision_finetuning.group_lr={nope: 1}": "group_lr.nope = 1 (--set); stages.vision_finetuning.group_lr has"
    " projectors, qk_norms, ",
    "stages.connector_pretraining.group_lr={vision_encoder: 1}": "tiny (--set): stages.connector_pretraining.group_lr"
    " has vision_encoder = 1.0, but that stage trains projectors, qk_norms alone",
    "stages.vision_finetuning.vision_layer_decay=0": "vision_layer_decay = 0 (--set): expected a number, above 0",
    "stages.modality_adaptation.vision_layer_decay=0.8": "stages.modality_adaptation.vision_layer_decay is 0.8,"
    " but that stage trains projectors, qk_norms, routed_attention, image_kv, not vision_encoder; expected 1",
    "training.seed=-1": "training.seed = -1 (--set): expected a whole number, from 0 to 2**63 - 1",
    "training.seed=9223372036854775808": "expected a whole number, from 0 to 2**63 - 1",
    "data.validation=''": "data.validation =  (--set): expected text or null, not empty",
    "data.text_validation=''": "expected text or null, not empty",
    "data.questions=''": "expected text or null, not empty",
    "data.cache=''": "expected text or null, not empty",
    "stages.vision_finetuning.steps=1.5": "expected a whole number or null, >= 1",
    "data.num_workers=yes": "data.num_workers = yes (--set): expected a whole number",
    "data.shuffle=maybe": "expected true or false",
    "data.train=[a]": "data.train = [a] (--set): expected text",
    "data.train=": "data.train = null (--set): expected text",
    "data.train={a: 0}": "data.train = {a: 0} (--set): expected text or a mapping, not empty, each weight > 0",
    "data.train={a: x}": "data.train.a = x (--set): expected a number",
    "data.train={}": "data.train = {} (--set): expected text or a mapping, not empty",
    "data.cache_limit=100": "data.cache_limit = 100 (--set): expected text or null, a size such as 100gb",
    "model.routes=null": "model (--set): routes is missing; a model of kind hive expects vision_blocks",
    "model.kind=cascaded": "routes are given, but a model of kind cascaded has none; expected null",
    "model.feature_block=0": "expected a whole number, not 0",
    "vlm=null": ", --set): vlm is missing, but stages has vlm_alignment, vlm_instruction_tuning",
    "vlm.languag_model=a": "unknown key vlm.languag_model = a (--set); did you mean language_model?",
    "stages.vlm_alignment.data={tempate: chat}": "unknown key stages.vlm_alignment.data.tempate = chat (--set)",
    "stages.vlm_alignment.data=3": "stages.vlm_alignment.data = 3 (--set): expected a mapping or null",
    "training=3": "training = 3 (--set): expected a mapping",
    "model.routes.vision_blocks=[0, 1, 2]": "vision_blocks = [0, 1, 2] (--set): expected a list, each value a whole",
    "model.routes.vision_blocks=[]": "at least one",
    "model.routes.vision_blocks=[1, 2]": "2 vision_blocks but 3 language_layers; expected two lists of one length",
    "model.routes={vision_blocks: [1, 1], language_layers: [2, 2]}": "block 1 -> layer 2 is listed more than once",
    "stages.vision_finetuning.micro_batch_size=0": "_size = 0 (--set): expected a whole number, >= 1, or auto",
    "stages.vision_finetuning.micro_batch_size=auot": "= auot (--set): expected a whole number, >= 1, or auto; did you "
    "mean auto?",
    "stages.vision_finetuning.micro_batch_size=[auto]": "= [auto] (--set): expected a whole number, >= 1, or auto",
    "stages.vision_finetuning.micro_batch_size=null": "= null (--set): expected a whole number, >= 1, or auto",
    "model.qknorm=none": "unknown key model.qknorm = none (--set); did you mean qk_norm?",
    "stages.vision_finetune.lr=1": "key stages.vision_finetune = {lr: 1} (--set); did you mean vision_finetuning?",
    "lr=1": "unknown key lr = 1 (--set); did you mean stages.<stage>.lr?",
    "xyz=1": "unknown key xyz = 1 (--set); a recipe has name, description, model, data, stages, vlm, training",
    "base=tiny": "unknown key base = tiny (--set)",
    "model": "--set model: expected key=value",
    "model..rope=1d": "--set model..rope=1d: expected key=value",
    "name={": "--set name={: not valid YAML",
    "name=*a": "recipes have no aliases",
    f"name={'[' * 3000}{']' * 3000}": "nested more than 20 levels deep",
    f"{'.'.join('a' * 3000)}=1": "3000 nested keys; recipes have five at most",
    "model.routes=0x10": "model.routes = 0x10 (--set): expected a mapping or null",
    "training={seed: 1, seed: 2}": "key seed was given before",
}


@pytest.mark.parametrize("override", BAD_VALUES)
def test_wrong_value_is_named(override: str):
    with pytest.raises(HiveError) as caught:
        load_recipe("tiny", [override])
    assert BAD_VALUES[override] in str(caught.value)
    assert "\n" not in str(caught.value)


BAD_FILES = {
    "twice": ("name: a\ndata:\n  train: x\n  train: y\n", "{path}:4: key train was given before, at line 3"),
    "syntax": ("name: [a\n", "{path}:2: not valid YAML"),
    "list": ("- a\n", "recipe {path}: the file holds [a]; expected `key: value` lines"),
    "empty": ("", "recipe {path}: the file holds null"),
    "missing": (
        "base: tiny\nstages:\n  vision_finetuning: null\nmodel: null\n",
        "model = null ({path}:4): expected a mapping",
    ),
    "unknown": ("base: tiny\nmodle:\n  rope: 2d\n", "unknown key modle = {{rope: 2d}} ({path}:2); did you mean model?"),
    "bare": ("name: a\n", "{path}: description is missing; expected text"),
    "loop": ("base: ./loop.yaml\n", "its base leads back to itself (loop.yaml -> loop.yaml)"),
    "base list": ("base: [tiny]\n", "base = [tiny] ({path}:1): expected the name or path of one recipe"),
    "base name": ("base: tinny\n", "recipe tinny: expected one of"),
    "key": ("[a]: 1\n", "{path}:1: a key is a list or a mapping"),
}


def test_a_chain_of_bases_without_end_is_named(tmp_path: Path):
    for number in range(1500):
        (tmp_path / f"r{number}.yaml").write_text(f"base: ./r{number + 1}.yaml\n")
    with pytest.raises(HiveError, match=r"recipe r0.yaml: more than 100 bases upon one another; expected few"):
        load_recipe(tmp_path / "r0.yaml")


@pytest.mark.parametrize("case", BAD_FILES)
def test_wrong_file_is_named(case: str, tmp_path: Path):
    text, expected = BAD_FILES[case]
    path = tmp_path / f"{case}.yaml"
    path.write_text(text)
    with pytest.raises(HiveError) as caught:
        load_recipe(path)
    assert expected.format(path=path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unreadable_files(tmp_path: Path):
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9\n")
    for path, expected in [(tmp_path / "latin.yaml", "not UTF-8"), (tmp_path / "none.yaml", "no such file")]:
        with pytest.raises(HiveError, match=expected):
            load_recipe(path)
    with pytest.raises(HiveError, match=r"recipe tinny: expected one of .*tiny.*; did you mean tiny\?"):
        load_recipe("tinny")
