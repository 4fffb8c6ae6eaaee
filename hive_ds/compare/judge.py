"""Judge one run: the answers of its VLM on held-out pictures, and probes of its encoder.

``python -m hive_ds.compare.judge RUN DATA`` is what `hive_ds.compare.pipeline` calls after every run, in a process of
its own: two runs are judged at a time.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from hive_ds.ablation.gather import SCORES
from hive_ds.data.scenes_samples import SceneFolders
from hive_ds.evaluation.probes.encoder import load_encoder
from hive_ds.evaluation.probes.results import best_block
from hive_ds.evaluation.probes.scene_factors import FACTORS, scene_probe_data
from hive_ds.evaluation.probes.settings import LinearSettings, ProbeSettings
from hive_ds.evaluation.probes.sweep import probe
from hive_ds.files import write_whole
from hive_ds.quickstart.base_folders import read_samples
from hive_ds.quickstart.questions import ask
from hive_ds.recipe import load_recipe

PROBE_TRAINING = 2400
"""Pictures that probes are fitted on: of the training scenes, which every arm has seen, labels and all."""
ANSWERS = "answers.json"


def judge(run: Path, data: SceneFolders) -> dict[str, float]:
    """Score the run in ``run``; all shares are from 0 to 1."""
    recipe = load_recipe(run / "recipe.yaml")
    results = ask(
        run / "stage5" / "model",
        read_samples(data.questions),
        template=recipe.data_of("vlm_instruction_tuning").template,
        seed=0,
        progress=lambda done, total: None,
    )
    results.save(run / ANSWERS)
    scores = {f"answers {kind}": share.value for kind, share in results.accuracy.items()}
    scores["answers all, pictures shuffled"] = results.shuffled_accuracy["all"].value
    assert recipe.vlm is not None
    scores |= probe_scores(recipe.vlm.vision_encoder or str(run / "encoder"), data)
    return scores


def probe_scores(encoder: str, data: SceneFolders) -> dict[str, float]:
    """Linear probes of every factor, at the block that the VLM reads (the last but one) and at the best block."""
    made = load_encoder(encoder)
    pictures = scene_probe_data(read_samples(data.train)[:PROBE_TRAINING], read_samples(data.validation))
    found = probe(made, pictures, ProbeSettings(LinearSettings(l2=1e-3), blocks="all", seeds=(0,)))
    read = max(made.info.num_blocks - 1, 1)
    at = {(result.task, result.block): result.accuracy for result in found}
    scores = {f"probe {factor}": at[factor, read] for factor in FACTORS}
    return scores | {
        f"probe {factor}, best block": best_block(found, made.info.name, factor).accuracy for factor in FACTORS
    }


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    write_whole(folder / SCORES, json.dumps(judge(folder, SceneFolders(Path(sys.argv[2]))), indent=1) + "\n")
