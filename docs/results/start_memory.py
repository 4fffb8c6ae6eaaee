"""Measure the memory that ranks need to start on the CPU: `start_memory.py [RANKS ...]`, default 2 4.

A SigLIP-B/16 and 4 layers of SmolLM2-1.7B's shape with random weights, stored in bf16, trained in bf16. Writes
start_memory.json beside itself: for each stage, policy and number of ranks, the most memory of its own that each rank
held while the model was read and the engine made, in MiB beyond what it held before. Pages of files that are only
mapped are shared by the ranks of a host and do not count.
"""

import json
import os
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path

HERE = Path(__file__).resolve().parent
TESTS = HERE.parents[1] / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "training"), str(TESTS / "data")]
POLICIES = ("zero2", "zero3")
RECIPE = """
name: start
description: memory at the start
model:
  vision_encoder: {root}/encoder
  language_model: {root}/language_model
  routes: {{vision_blocks: [3, 12], language_layers: [1, 3]}}
data: {{train: {root}/train}}
stages:
  connector_pretraining: {{lr: 1e-3, global_batch_size: 8, micro_batch_size: 1, steps: 1}}
  modality_adaptation: {{lr: 1e-3, global_batch_size: 8, micro_batch_size: 1, steps: 1}}
training: {{precision: bf16}}
"""


def write_models(root: Path) -> int:
    """Base models and a recipe over them; returns the number of weights."""
    from tiny_data import make_image_processor, make_tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, SiglipVisionConfig, SiglipVisionModel

    encoder = SiglipVisionModel(SiglipVisionConfig())
    shape = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 4, "vocab_size": 49152}
    heads = {"num_attention_heads": 32, "tie_word_embeddings": True}
    language_model = LlamaForCausalLM(LlamaConfig(**shape, **heads))
    for name, model in (("encoder", encoder), ("language_model", language_model)):
        model.bfloat16().save_pretrained(root / name)
    make_image_processor(size=224).save_pretrained(root / "encoder")
    make_tokenizer("llama3").save_pretrained(root / "language_model")
    (root / "recipe.yaml").write_text(RECIPE.format(root=root))
    return sum(parameter.numel() for model in (encoder, language_model) for parameter in model.parameters())


def on_a_rank(recipe_file: str, policy: str, number: str, root: str) -> None:
    """Start the stage as `hive_ds.train` does, up to the engine, and print what each rank needed."""
    from own_memory import most_memory
    from ranks import Ranks
    from stage_helpers import put_under_engine
    from start_checks import begin

    from hive_ds.recipe import load_recipe
    from hive_ds.stages import stage_by_number
    from hive_ds.training.checkpoint import save_model
    from hive_ds.training.distributed import all_values, read_world, start, stop
    from hive_ds.training.global_batch import fit_micro_batch

    world = read_world(os.environ)
    ranks = Ranks(world, start(world), Path(root), frozen=0)
    recipe, stage = load_recipe(recipe_file), stage_by_number(int(number))
    config = fit_micro_batch(recipe.stages[stage.name], world.size)
    with most_memory() as most:
        model, processor, folder, attempt = begin(ranks, recipe, Path(root) / "run", stage.number)
        engine = put_under_engine(ranks, model, stage, zero=policy, precision="bf16", config=config).engine
    found = all_values(round(most[0]))
    if number == "1":  # what stage 2 starts with
        save_model(folder.model, engine, processor, world, attempt)
        folder.done.touch()
    if world.is_main:
        print(json.dumps(found))
    stop()


def main() -> None:
    """Start each policy on each number of ranks."""
    from hive_ds.versions import made_with

    cases = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        weights = write_models(root)
        for ranks in sys.argv[1:] or ("2", "4"):
            for stage, policy in product("12", POLICIES):
                launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks]
                rest = ["--rank", str(root / "recipe.yaml"), policy, stage, folder]
                done = subprocess.run([*launch, __file__, *rest], capture_output=True, text=True)
                if done.returncode:
                    raise SystemExit(done.stderr)
                name = f"stage {stage}, {policy}, {ranks} ranks"
                cases[name] = json.loads(done.stdout.splitlines()[-1])
                print(name, cases[name], flush=True)
    out = HERE / "start_memory.json"
    out.write_text(json.dumps({**made_with(), "weights": weights, "mib": cases}, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        on_a_rank(*sys.argv[2:])
    else:
        main()
