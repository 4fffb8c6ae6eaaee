"""The ``hive-ds`` command: each subcommand is one call into the library.

Heavy modules are imported inside the commands, so that ``--help`` and ``recipe show`` answer at once.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from hive_ds import __version__
from hive_ds.errors import run_command
from hive_ds.recipe import RECIPES, dump_recipe, load_recipe, recipe_names, resolve

Command = Callable[[argparse.Namespace], int | None]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, or 2 for wrong input."""
    args = build_parser().parse_args(argv)
    return run_command(lambda: args.run(args), debug=args.debug)


class _Parser(argparse.ArgumentParser):
    """A parser that reports a wrong command line as every other wrong input: one line, exit code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = _Parser(
        prog="hive-ds",
        description="Pre-train vision encoders with a language model's supervision (HIVE, arXiv 2604.00086).",
        epilog="Train a stage with: deepspeed --module hive_ds.train --recipe NAME --stage 1 --run FOLDER",
    )
    parser.add_argument("--version", action="version", version=f"hive-ds {__version__}")
    parser.add_argument("--debug", action="store_true", help="print the stack trace of an error")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_quickstart(commands)
    recipe = _group(commands, "recipe", "list the recipes, or show one with the origin of every value")
    _add_recipe_list(recipe)
    _add_recipe_show(recipe)
    data = _group(commands, "data", "make training data: generated scenes, or a dataset of your own")
    _add_data_scenes(data)
    _add_data_convert(data)
    export = _group(commands, "export", "turn a trained model into stock Hugging Face folders")
    _add_export_encoder(export)
    return parser


def _group(commands: Any, name: str, help: str) -> Any:
    parser = commands.add_parser(name, help=help, description=_sentence(help))
    return parser.add_subparsers(title="commands", metavar="COMMAND", required=True)


def _command(group: Any, name: str, run: Command, help: str, more: str = "") -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = group.add_parser(name, help=help, description=f"{_sentence(help)} {more}".strip())
    # SUPPRESS: a default here would undo `hive-ds --debug COMMAND`.
    parser.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="print an error's stack trace")
    parser.set_defaults(run=run)
    return parser


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _add_quickstart(commands: Any) -> None:
    def run(args: argparse.Namespace) -> None:
        from hive_ds.quickstart.pipeline import run_quickstart
        from hive_ds.quickstart.settings import DEFAULT, SMOKE

        run_quickstart(args.out, seed=args.seed, settings=SMOKE if args.smoke else DEFAULT)

    parser = _command(
        commands,
        "quickstart",
        run,
        "train a tiny HIVE through its three stages and show what it learned",
        "Draws the data, makes the base models, trains on 2 ranks, exports the encoder and writes a page of results."
        " What OUT holds already is not done again.",
    )
    parser.add_argument(
        "--out", metavar="OUT", type=Path, default=Path("runs/quickstart"), help="folder (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of data and training (default: %(default)s)")
    parser.add_argument("--smoke", action="store_true", help="a few steps of everything, which learns nothing")


def _add_recipe_list(group: Any) -> None:
    def run(args: argparse.Namespace) -> None:
        width = max(map(len, recipe_names()))
        for name in recipe_names():
            print(f"{name:<{width}}  {load_recipe(name).description}")
        print(f"\nThey lie in {RECIPES}")

    _command(group, "list", run, "list the recipes that come with the package")


def _add_recipe_show(group: Any) -> None:
    def run(args: argparse.Namespace) -> None:
        print(dump_recipe(*resolve(args.recipe, args.overrides)), end="")

    parser = _command(
        group,
        "show",
        run,
        "print a recipe with every value and where it came from",
        "The output is YAML, a recipe itself. Precedence: defaults < base recipe < the file < --set.",
    )
    parser.add_argument("recipe", metavar="RECIPE", help="name of a recipe, or path of a .yaml file")
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override one value, as model.rope=1d or stages.vision_finetuning.lr=1e-5; the value is YAML; repeatable",
    )


def _add_data_scenes(group: Any) -> None:
    def run(args: argparse.Namespace) -> None:
        from hive_ds.data.scenes_samples import write_scenes

        folders = write_scenes(args.out, args.num, args.seed, size=args.size)
        print(f"wrote {args.num} scenes to {folders.train}; held-out ones and text beside it")

    parser = _command(
        group,
        "scenes",
        run,
        "draw captioned scenes of coloured shapes, with questions and answers",
        "Writes MDS shards to OUT/train, validation, questions, text and text_validation; one seed, one set of bytes.",
    )
    parser.add_argument("out", metavar="OUT", type=Path, help="new folder")
    parser.add_argument("--num", type=int, default=4000, help="training pictures (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of everything drawn (default: %(default)s)")
    parser.add_argument("--size", type=int, default=64, help="side of a picture in pixels (default: %(default)s)")


def _add_data_convert(group: Any) -> None:
    def run(args: argparse.Namespace) -> None:
        from hive_ds.data.convert import convert_llava

        print(convert_llava(args.json, args.images, args.out))

    parser = _command(
        group,
        "convert",
        run,
        "convert a LLaVA-format JSON file and its image folder to MDS shards",
        "Samples that cannot be used are left out and listed in OUT/rejects.jsonl with the reason.",
    )
    parser.add_argument("json", metavar="JSON", type=Path, help="list of {id, image, conversations}")
    parser.add_argument("images", metavar="IMAGES", type=Path, help="folder that the image paths start at")
    parser.add_argument("out", metavar="OUT", type=Path, help="new folder")


def _add_export_encoder(group: Any) -> None:
    def run(args: argparse.Namespace) -> None:
        from hive_ds.export import export_encoder

        report = export_encoder(args.source, args.out)
        trained = f"{report.trained_blocks} of {report.num_blocks} blocks trained"
        parity = f"features read back within {report.largest_difference:.1e}"
        print(f"wrote {report.model_class} to {report.folder}: {trained}, {parity}")

    parser = _command(
        group,
        "encoder",
        run,
        "write the trained vision encoder as a folder that plain transformers loads",
        "The folder is read back and its features compared before the command says it is done.",
    )
    parser.add_argument("source", metavar="SOURCE", type=Path, help="a run's folder, or a model's")
    parser.add_argument("out", metavar="OUT", type=Path, help="new folder")
