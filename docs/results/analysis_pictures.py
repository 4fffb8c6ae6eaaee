"""The pictures of docs/analysis.md, and the numbers behind the plot. After `make quickstart` and `make compare`."""

import contextlib
from pathlib import Path

from hive_ds.cli import main
from hive_ds.data.scenes_samples import question_samples

IMAGES, RESULTS, SCENE = Path("docs/images"), Path("docs/results"), Path("runs/scene.png")
RUNS, BASE, DATA = "runs/compare/runs", "runs/compare/base/vision_encoder", "runs/compare/data/validation"
ASKED = ["--image", str(SCENE), "--question", "what colour is the ring?", "--text", "blue"]

*_, sample = question_samples(0, "questions", 13, 64)
SCENE.write_bytes(sample.images[0])
for name in ("hive", "sa"):
    model, out = f"{name.upper()}={RUNS}/{name}-seed0/stage3", IMAGES / f"gradients_{name}.png"
    main(["analyze", "gradients", model, *ASKED, "--out", str(out)])
asked = ["--image", str(SCENE), "--question", "what colour is the square?", "--text", "white"]
main(["analyze", "attention", "runs/quickstart", *asked, "--out", str(IMAGES / "attention_tokens.png")])
models = [f"{name}={RUNS}/{name.lower()}-seed0/stage3" for name in ("HIVE", "SA", "last")]
options = ["--knock-out", "--initial", BASE, "--out", str(IMAGES / "flow.png"), "--json"]
with (RESULTS / "flow.json").open("w") as file, contextlib.redirect_stdout(file):
    main(["analyze", "flow", *models, "--data", DATA, "--samples", "256", *options])
