"""Every command of README and docs: read by the parser that would read it, and run where that is cheap."""

from __future__ import annotations

import re

import pytest
from doc_commands import PROGRAMS, command_lines, faults
from doc_pages import blocks, code_spans, page_names

from hive_ds.cli import main
from hive_ds.recipe import recipe_names

COMMANDS = re.compile(r"^(hive-ds|deepspeed|torchrun|srun|salloc|sbatch|make|python -m|slurm/\w+\.sh|pytest|pip) ")
"""What makes code outside of a bash block a command."""
HISTORY = ("CHANGELOG.md", "docs/lab_log.md")
"""Pages on what was once; their commands may be gone."""
WRITTEN = [page for page in page_names() if not page.startswith("docs/reference/")]
"""Those that people write."""


def commands_of(page: str) -> list[tuple[str, list[str]]]:
    """Place and words of every command of a page."""
    found = []
    for block in blocks(page):
        lines = block.text.split("\n")
        if block.language == "bash":
            found += [(block.place, words) for words in command_lines(block.text)]
        elif block.language in ("", "text"):
            found += [(block.place, words) for line in lines if COMMANDS.match(line) for words in command_lines(line)]
    return found


@pytest.mark.parametrize("page", WRITTEN)
def test_commands_are_what_their_parsers_take(page: str):
    found = [f"{place}: {fault}" for place, words in commands_of(page) for fault in faults(words)]
    assert found == []


@pytest.mark.parametrize("page", [page for page in WRITTEN if page not in HISTORY])
def test_commands_in_sentences_name_what_is_there(page: str):
    """Spans often leave arguments out: commands, options, targets and scripts are looked up."""
    spans = [span for span in code_spans(page) if COMMANDS.match(span + " ") and span not in PROGRAMS]
    found = []
    for span in spans:
        for words in command_lines(span):
            found += [
                f"{page}: `{span}`: {fault}" for fault in faults([*words, "..."] if words[0] != "make" else words)
            ]
    assert found == []


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("hive-ds recipe shw tiny", "invalid choice: 'shw'"),
        ("hive-ds recipe show tinny", "recipe tinny is not there"),
        ("hive-ds export encoder runs/a out --tails cut", "unrecognized arguments: --tails cut"),
        ("hive-ds export encoder ... --tails cut", "no option --tails"),
        ("hive-ds exports ...", "hive-ds exports: no such command"),
        ("deepspeed --num_gpu 8 --module hive_ds.train --recipe tiny --stage 1 --run r", "runner.py has no --num_gpu"),
        ("deepspeed --module hive_ds.train --recipe tiny --run r", "required: --stage"),
        (
            "hive-ds supervise -- torchrun -m hive_ds.train --recipe tiny --stage one --run r",
            "stage one: expected one of 1 (connector_pretraining)",
        ),
        ("hive-ds hosts run hosts -- --recipe tiny --stage 1", "required: --run"),
        ("make quikstart", "make quikstart: no such target"),
        ("make test PARTS=checks", "variable PARTS is read nowhere"),
        ("sbatch --nodes 2 slurm/stage9.sh", "slurm/stage9.sh: no such script"),
        ("sbatch slurm/stage1.sh --spare 1", "slurm/stage1.sh does not know --spare"),
        ("sbatch slurm/convert.sh a.json out --image b", "--image"),
        ("python -m hive_ds.trains", "no such module"),
        ('pip install -e ".[streeming]"', "no extra streeming"),
        ("cd docs && pytest tests/none.py", "tests/none.py: no such file"),
        ("wget x", "wget: a program that no test knows"),
    ],
)
def test_a_planted_fault_is_found(line: str, fault: str):
    found = [one for words in command_lines(line) for one in faults(words)]
    assert any(fault in one for one in found), found


def test_scripts_are_split_into_commands():
    script = "A=1 make test  # words\ncat > f <<'END'\nnot: a command\nEND\n"
    script += "hive-ds \\\n  recipe list | head && cd 'a b'; ..."
    assert list(command_lines(script)) == [
        ["make", "test"],
        ["cat"],
        ["hive-ds", "recipe", "list"],
        ["head"],
        ["cd", "a b"],
    ]


def test_cheap_commands_run(capsys: pytest.CaptureFixture[str]):
    cheap = {
        tuple(words)
        for page in WRITTEN
        for _, words in commands_of(page)
        if words[:2] == ["hive-ds", "recipe"] and words[-1] in ("list", *recipe_names())
    }
    assert {words[2] for words in cheap} >= {"list", "show"}
    for words in sorted(cheap):
        assert main(words[1:]) == 0, words
        assert capsys.readouterr().out
