"""What the parts of the command line share."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from hive_ds.errors import HiveError

Command = Callable[[argparse.Namespace], int | None]


class Parser(argparse.ArgumentParser):
    """A parser that reports a wrong command line as every other wrong input: one line, exit code 2."""

    def error(self, message: str) -> NoReturn:
        """End the program."""
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


def group(commands: Any, name: str, help: str) -> Any:
    """Add ``name``, which has commands of its own, and return what they are added to."""
    parser = commands.add_parser(name, help=help, description=_sentence(help))
    return parser.add_subparsers(title="commands", metavar="COMMAND", required=True)


def command(group: Any, name: str, run: Command, help: str, more: str = "") -> argparse.ArgumentParser:
    """Add the command ``name``, which calls ``run``; ``more`` is said in its own help alone."""
    parser: argparse.ArgumentParser = group.add_parser(name, help=help, description=f"{_sentence(help)} {more}".strip())
    # SUPPRESS: a default here would undo `hive-ds --debug COMMAND`.
    parser.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="print an error's stack trace")
    parser.set_defaults(run=run)
    return parser


def add_overrides(parser: argparse.ArgumentParser, help: str = "override one value of the recipe; repeatable") -> None:
    """Add ``--set KEY=VALUE``, which may be given often: ``args.overrides``."""
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help=help)


def port_number(text: str) -> int:
    """An argument that is a port: argparse's ``type``."""
    if not (text.isdecimal() and 0 < int(text) < 1 << 16):
        raise argparse.ArgumentTypeError(f"{text} is no port; expected 1 to 65535")
    return int(text)


def require_positive(args: argparse.Namespace, *names: str) -> None:
    """HiveError where a number of these was given and is less than 1."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value < 1:
            raise HiveError(f"--{name.replace('_', '-')} {value}: expected a number of at least 1")


def require_file_to_write(*paths: Path | None) -> None:
    """HiveError where one of these, of what is written at the end, is a folder."""
    for path in paths:
        if path is not None and path.is_dir():
            raise HiveError(f"{path}: is a folder; expected the name of a file to write")


def split_name(given: str) -> tuple[str | None, str]:
    """Name and source of ``[NAME=]SOURCE``; a path with a ``=`` in it is no name."""
    name, equals, source = given.partition("=")
    return (None, given) if not equals or "/" in name else (name, source)


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."
