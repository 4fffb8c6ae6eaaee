"""The stages of a recipe, for scripts: ``python -m hive_ds.launch.stages RECIPE [--set KEY=VALUE]``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from hive_ds.errors import run_command
from hive_ds.recipe import load_recipe
from hive_ds.stages import STAGES


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the numbers of the stages that the recipe describes, in order, on one line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="hive_ds.launch.stages", description=main.__doc__)
    parser.add_argument("recipe")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--debug", action="store_true")
    options = parser.parse_args(arguments)

    def show() -> None:
        described = load_recipe(options.recipe, options.set).stages
        print(*(stage.number for stage in STAGES if stage.name in described))

    return run_command(show, debug=options.debug)


if __name__ == "__main__":
    sys.exit(main())
