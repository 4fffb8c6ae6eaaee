"""The reference of commands, from the parsers that read them."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from hive_docs.markdown import MADE, cell, code, table
from hive_ds.cli import build_parser
from hive_ds.train_options import build_parser as build_train_parser

INTRODUCTION = """\
# Commands

`hive-ds` and its commands, and `hive_ds.train`, which every launcher starts. Wrong input is one line on standard error
and exit code 2; `--debug`, of every command, shows the stack trace too. What training itself ends with is in
[training.md](../training.md#what-stops-a-run-and-what-does-not).

"""

TRAIN = """\
## hive_ds.train

A launcher starts it on every rank: `deepspeed --module hive_ds.train ...`, `torchrun -m hive_ds.train ...` and
[others](../cluster.md#launchers); `python -m hive_ds.train ...` trains on one.

"""


def commands_page() -> str:
    """The page."""
    parser = build_parser()
    leaves = list(leaf_parsers(parser))
    summary = table(
        ["command", ""], [[f"[`{name}`](#{name.replace(' ', '-')})", cell(_first(leaf))] for name, leaf in leaves]
    )
    sections = [f"## {name}\n\n{_body(name, leaf)}" for name, leaf in leaves]
    train = TRAIN + _body("python -m hive_ds.train", build_train_parser())
    return MADE + INTRODUCTION + summary + "\n" + "\n".join([*sections, train])


def leaf_parsers(parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Every command that has none below it, with its whole name, in the order of the help."""
    groups = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not groups:
        yield parser.prog, parser
    for group in groups:
        for child in dict.fromkeys(group.choices.values()):  # a command and its aliases are one parser
            yield from leaf_parsers(child)


def _first(parser: argparse.ArgumentParser) -> str:
    """First sentence of a parser's description."""
    return (parser.description or "").partition(". ")[0].rstrip(".")


def _body(name: str, parser: argparse.ArgumentParser) -> str:
    actions = [action for action in parser._actions if action.help != argparse.SUPPRESS and not _said_once(action)]
    required = " ".join(_usage(action) for action in actions if action.required or not action.option_strings)
    options = " [OPTIONS]" if any(action.option_strings and not action.required for action in actions) else ""
    usage = f"    {name} {required}".rstrip() + f"{options}\n"
    description = f"\n{cell(parser.description)}\n" if parser.description else ""
    rows = [[_names(action), _value(action), cell(_help(parser, action))] for action in actions]
    return usage + description + ("\n" + table(["argument", "value", ""], rows) if rows else "")


def _said_once(action: argparse.Action) -> bool:
    """Options that every command has are said at the top of the page."""
    return bool({"--help", "--debug", "--version"} & set(action.option_strings))


def _usage(action: argparse.Action) -> str:
    value = _metavar(action)
    if action.option_strings:
        return f"{action.option_strings[0]} {value}".rstrip()
    return f"{value} ..." if action.nargs in ("+", "*", argparse.REMAINDER) else value


def _names(action: argparse.Action) -> str:
    return ", ".join(code(name) for name in action.option_strings) or code(_metavar(action))


def _metavar(action: argparse.Action) -> str:
    if action.nargs == 0:
        return ""
    if action.metavar is not None:
        return action.metavar if isinstance(action.metavar, str) else " ".join(action.metavar)
    return "|".join(map(str, action.choices)) if action.choices else action.dest.upper()


def _value(action: argparse.Action) -> str:
    """What follows an option, and its default where the help does not say it."""
    if not action.option_strings or action.nargs == 0:
        return ""
    choices = ", ".join(code(str(choice)) for choice in action.choices or ())
    default = action.default
    unsaid = default not in (None, argparse.SUPPRESS, [], "") and "default" not in (action.help or "")
    return (choices or code(_metavar(action))) + (f" (default: {cell(str(default))})" if unsaid else "")


def _help(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    """An option's help with its ``%(default)s`` filled in."""
    return parser._get_formatter()._expand_help(action) if action.help else ""
