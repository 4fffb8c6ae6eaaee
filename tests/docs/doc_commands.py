"""What is wrong with a command line of the docs, found without running it."""

from __future__ import annotations

import argparse
import ast
import importlib.metadata
import importlib.util
import re
import shlex
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path

from doc_pages import ROOT
from hive_docs.commands import leaf_parsers

from hive_ds.cli import build_parser
from hive_ds.errors import HiveError
from hive_ds.recipe import recipe_names
from hive_ds.stages import stage_called
from hive_ds.train_options import build_parser as build_train_parser

ASSIGNMENT = re.compile(r"[A-Za-z_]\w*=.*", re.S)
LEFT_OUT = "..."
"""Stands in the docs for arguments of the reader's own."""


class _WrongLineError(Exception):
    pass


def command_lines(script: str) -> Iterator[list[str]]:
    """The words of every simple command of a shell script; comments and here-documents are left out."""
    script = re.sub(r"<<-?\s*'?(\w+)'?(.*)\n(?:.*\n)*?\1(?=\n|$)", r"\2", script)
    script = re.sub(r"(^|\s)#.*$", "", script, flags=re.M).replace("\\\n", " ")
    lexer = shlex.shlex(script, posix=True, punctuation_chars=";|&\n>")
    lexer.whitespace = " \t\r"
    lexer.whitespace_split = True
    words: list[str] = []
    for token in lexer:
        if set(token) <= set(";|&\n"):
            yield from _given(words)
            words = []
        else:
            words.append(token)
    yield from _given(words)


def _given(words: list[str]) -> Iterator[list[str]]:
    if any(set(word) == {">"} for word in words):
        words = words[: next(place for place, word in enumerate(words) if set(word) == {">"})]
    while words and ASSIGNMENT.fullmatch(words[0]):
        words = words[1:]
    if words and words[0] not in LEFT_OUT:
        yield words


def faults(words: list[str]) -> list[str]:
    """One line a fault of a command; empty where there is none."""
    program, arguments = Path(words[0]).name, words[1:]
    if words[0].startswith("slurm/"):
        return _script(words)
    check = PROGRAMS.get(program)
    if check is None:
        return [f"{program}: a program that no test knows"]
    return check(arguments)


def _nothing(arguments: list[str]) -> list[str]:
    return []


def _hive_ds(arguments: list[str]) -> list[str]:
    found = _parse(build_parser(), "hive-ds", arguments)
    if arguments[:1] == ["supervise"] and "--" in arguments:
        found += faults(arguments[arguments.index("--") + 1 :])
    if arguments[:2] == ["hosts", "run"] and "--" in arguments:
        found += _parse(build_train_parser(), "hive_ds.train", arguments[arguments.index("--") + 1 :])
    if arguments[:1] == ["ablate"] and "--launcher" in arguments:
        launcher = arguments[arguments.index("--launcher") + 1]
        found += faults([*shlex.split(launcher), "--recipe", "tiny", "--stage", "1", "--run-folder", "RUN"])
    return found


def _parse(parser: argparse.ArgumentParser, name: str, arguments: list[str]) -> list[str]:
    """What the real parser says; where arguments are left out, whether it has the options that are not."""
    if any(LEFT_OUT in word or word.startswith("[") for word in arguments):
        return _unknown_options(parser, name, arguments) + _lost_recipes(_after("--recipe", arguments))
    for one in _parsers(parser):
        one.error = _raise  # type: ignore[method-assign]
        one.exit = lambda *_: None  # type: ignore[method-assign,assignment]
    asks = {"--help", "--version"} & set(arguments)
    try:
        given = vars(parser.parse_args([word for word in arguments if word not in asks]))
        if name == "hive_ds.train" and not given["stage"].isupper():
            stage_called(given["stage"])
    except (_WrongLineError, HiveError) as error:
        return [] if asks else [f"{name} {' '.join(arguments)}: {error}"]
    named = [given[key] for key in ("recipe", "against") if given.get(key) is not None]
    return _lost_recipes(str(name) for one in named for name in (one if isinstance(one, list) else [one]))


def _parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """The parser and all below it."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from _parsers(below)


def _raise(message: str) -> None:
    raise _WrongLineError(message)


def _unknown_options(parser: argparse.ArgumentParser, name: str, arguments: list[str]) -> list[str]:
    leaves = dict(leaf_parsers(parser))
    words = [word for word in arguments if re.fullmatch(r"[a-z]+", word)]
    given = [" ".join(["hive-ds", *words[:count]]) for count in (2, 1)]
    leaf = next((leaves[command] for command in given if command in leaves), None)
    if leaf is None and name == "hive-ds":
        return [] if any(command.startswith(given[-1]) for command in leaves) else [f"{given[-1]}: no such command"]
    known = {option for action in (leaf or parser)._actions for option in action.option_strings}
    before = arguments[: arguments.index("--")] if "--" in arguments else arguments
    options = [word.strip("[]").partition("=")[0] for word in before if word.strip("[").startswith("--")]
    return [f"{name} {' '.join(arguments)}: no option {option}" for option in options if option not in known]


def _after(option: str, arguments: list[str]) -> list[str]:
    return [value for word, value in pairwise(arguments) if word == option]


def _lost_recipes(names: Iterable[str]) -> list[str]:
    """Names of recipes that are not there; paths and the capitals of a usage line are the reader's."""
    lost = [name for name in names if not (name in recipe_names() or name.endswith(".yaml") or name.isupper())]
    return [f"recipe {name} is not there" for name in lost if name != LEFT_OUT]


def _launcher(source: str) -> Callable[[list[str]], list[str]]:
    """A check of a launcher's own options, which its source file holds, and of what it starts."""

    def check(arguments: list[str]) -> list[str]:
        if "hive-ds" in arguments:
            return _hive_ds(arguments[arguments.index("hive-ds") + 1 :])
        place = next((i for i, word in enumerate(arguments) if re.fullmatch(r"hive_ds[./]train(\.py)?", word)), None)
        if place is None and LEFT_OUT not in arguments:
            return [f"{' '.join(arguments)}: starts neither hive_ds.train nor hive-ds"]
        options = [word.partition("=")[0] for word in arguments[:place] if word.startswith("--")]
        found = [f"{source} has no {option}" for option in options if not _declares(_package_file(source), option)]
        return found + ([] if place is None else _parse(build_train_parser(), "hive_ds.train", arguments[place + 1 :]))

    return check


def _declares(text: str, option: str) -> bool:
    """Whether a parser's source names the option; torch's also takes dashes for underscores."""
    return any(f'"{one}"' in text for one in (option, option[:2] + option[2:].replace("-", "_")))


@cache
def _package_file(path: str) -> str:
    """Text of an installed package's file; the package is not imported."""
    package, _, below = path.partition("/")
    spec = importlib.util.find_spec(package)
    assert spec
    assert spec.submodule_search_locations
    return (Path(spec.submodule_search_locations[0]) / below).read_text()


def _srun(arguments: list[str]) -> list[str]:
    command = next((i for i, word in enumerate(arguments) if word in PROGRAMS), None)
    return (
        [f"srun {' '.join(arguments)}: starts nothing that is known"]
        if command is None
        else faults(arguments[command:])
    )


def _bash(arguments: list[str]) -> list[str]:
    if "-c" not in arguments:
        return []
    return [fault for words in command_lines(arguments[arguments.index("-c") + 1]) for fault in faults(words)]


def _sbatch(arguments: list[str]) -> list[str]:
    script = next((i for i, word in enumerate(arguments) if word.endswith(".sh")), None)
    if script is None and LEFT_OUT in arguments:
        return []
    return [f"sbatch {' '.join(arguments)}: names no script"] if script is None else _script(arguments[script:])


def _script(words: list[str]) -> list[str]:
    """A job script is there, and the command it hands them to, the common parser or its lines know its options."""
    path = ROOT / words[0]
    if not path.is_file():
        return [f"{words[0]}: no such script"]
    if handed_on := re.search(r"\[options of (hive-ds [a-z ]+)\]", path.read_text()):
        found = faults([*handed_on[1].split(), *words[1:]])
        return [fault for fault in found if "are required: " not in fault]  # which the script may give itself
    texts = path.read_text() + (ROOT / "slurm" / "body.sh").read_text()
    options = [word for word in words[1:] if word.startswith("--")]
    found = [f"{words[0]} does not know {one}" for one in options if not re.search(rf"{one}(?![\w-])", texts)]
    return found + _lost_recipes(_after("--recipe", words))


def _make(arguments: list[str]) -> list[str]:
    text = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^([a-z0-9-]+):.*## ", text, re.M)
    found = []
    for word in arguments:
        name, equals, _ = word.partition("=")
        if equals and not re.search(rf"\b{name}\b", text) and name not in _environment_names():
            found.append(f"make: variable {name} is read nowhere")
        elif not equals and word not in targets:
            found.append(f"make {word}: no such target")
    return found


@cache
def _environment_names() -> set[str]:
    """Variables that the sources read from the environment."""
    texts = "".join(path.read_text() for folder in ("hive_ds", "kernels") for path in (ROOT / folder).rglob("*.py"))
    return set(re.findall(r"environ(?:\.get\(|\[)\"(\w+)\"", texts))


def _python(arguments: list[str]) -> list[str]:
    if arguments[:1] == ["-c"]:
        ast.parse(arguments[1])
        return []
    if arguments[:1] != ["-m"]:
        return [] if (ROOT / arguments[0]).is_file() else [f"python {arguments[0]}: no such file"]
    module, rest = arguments[1], arguments[2:]
    if module == "hive_ds.train":
        return _parse(build_train_parser(), module, rest)
    if module == "pytest":
        return _pytest(rest)
    if module == "venv":
        return []
    file = module.replace(".", "/").replace("hive_ds/kernels", "kernels/hive_kernels")
    if file.startswith("benchmarks"):
        file = f"kernels/{file}"
    there = (ROOT / f"{file}.py").is_file() or (ROOT / file / "__main__.py").is_file()
    return [] if there else [f"python -m {module}: no such module"]


def _pytest(arguments: list[str]) -> list[str]:
    paths = [word for word in arguments if "/" in word]
    return [f"pytest {path}: no such file" for path in paths if not list(ROOT.glob(path.partition("::")[0]))]


def _pip(arguments: list[str]) -> list[str]:
    declared = importlib.metadata.metadata("hive-ds").get_all("Provides-Extra") or []
    extras = [extra for word in arguments for extra in _extras(word)]
    return [f"pip: no extra {extra}" for extra in extras if extra.replace("_", "-") not in declared]


def _extras(requirement: str) -> list[str]:
    inside = re.fullmatch(r"(?:\.|hive-ds)\[(.+)\]", requirement)
    return inside[1].split(",") if inside else []


def _source(arguments: list[str]) -> list[str]:
    made = (".venv/bin/activate",)  # by `make venv`
    return [f"{path}: no such file" for path in arguments if path not in made and not (ROOT / path).is_file()]


PROGRAMS: dict[str, Callable[[list[str]], list[str]]] = {
    "hive-ds": _hive_ds,
    "deepspeed": _launcher("deepspeed/launcher/runner.py"),
    "torchrun": _launcher("torch/distributed/run.py"),
    "srun": _srun,
    "salloc": _srun,
    "bash": _bash,
    "sbatch": _sbatch,
    "make": _make,
    "python": _python,
    "pytest": _pytest,
    "pip": _pip,
    "source": _source,
    "$EDITOR": _source,
    **dict.fromkeys(("cat", "cd", "git", "ls", "tail", "mkdir", "export", "touch", "hf", "scontrol", "ip"), _nothing),
    **dict.fromkeys((".ci/run", "run", "apt-get", "lmms-eval", "echo", "squeue"), _nothing),
}
"""By program: what is wrong with its arguments. Those of other projects are not checked."""
