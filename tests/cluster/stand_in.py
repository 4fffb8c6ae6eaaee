"""A trainer of no weight, for tests of the scripts around it; it keeps the real one's contract of files and exit codes.

`stand_in_package` puts it where ``hive_ds.train`` is looked for. HIVE_STAND_IN says what it does: a number of seconds
to train for, ``exit N``, ``stuck N`` (the same, with a new checkpoint in the first two attempts alone), or ``hang``.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
RECIPES = (
    *("checks.py", "config.py", "errors.py", "stages.py"),
    *("recipe.py", "recipe_source.py", "recipe_values.py", "recipes"),
)
"""What reads a recipe, which `pipeline.sh` does too."""


def stand_in_package(folder: Path) -> Path:
    """A new folder with a package hive_ds, whose trainer is this file; launcher and recipes are the real ones."""
    package = folder / "stand-in" / "hive_ds"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    for name in ("launch", *RECIPES):
        (package / name).symlink_to(REPOSITORY / "hive_ds" / name)
    (package / "train.py").symlink_to(Path(__file__))
    return package.parent


def main(arguments: list[str]) -> int:
    """Wait, then write DONE; stop where STOP asks for it."""
    options = dict(zip(arguments[::2], arguments[1::2], strict=True))
    folder = Path(options["--run-folder"]) / f"stage{options['--stage']}"
    names = ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "CUDA_VISIBLE_DEVICES")
    place = {"host": os.uname().nodename, **{name: os.environ.get(name) for name in names}, "arguments": arguments}
    logs = Path(os.environ["HIVE_LOGS"])
    (logs / f"rank-{place['RANK']}.json").write_text(json.dumps(place))
    behaviour = os.environ["HIVE_STAND_IN"]
    if behaviour.startswith("stuck"):
        restarts = int(os.environ["HIVE_ATTEMPT"].rpartition(".")[2])
        aside = folder / f".latest-{place['RANK']}"  # of any rank: the first that ends has written it
        aside.write_text(f"step-{min(restarts, 1):06d}")  # no end of line, as the trainer writes it
        aside.replace(folder / "latest")
    if behaviour.startswith(("exit", "stuck")):
        return int(behaviour.split()[1])
    if behaviour == "hang":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        while True:
            time.sleep(60)
    worked = folder / f"worked-{place['RANK']}"  # its checkpoint: seconds trained so far
    seconds = float(worked.read_text()) if worked.exists() else 0.0
    while seconds < float(behaviour):
        time.sleep(0.1)
        seconds += 0.1
        worked.write_text(str(seconds))
        if (folder / "STOP").exists():
            return 85
    if place["RANK"] == "0":
        (folder / "DONE").touch()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
