from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from full_disk import full_disk
from PIL import Image

from hive_ds.cli import main
from hive_ds.errors import HiveError, OutsideError, run_command, told_as
from hive_ds.files import must_write, write_whole
from hive_ds.recipe import load_recipe, recipe_names

NO_MEMORY = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory:\n9 bytes")
"""As torch has it, in short."""
WRONG_PATHS = (errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENOTEMPTY)
WRONG_PATHS += (errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP)
HEAVY = {"torch", "transformers", "deepspeed", "streaming", "numpy"}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "import sys; from hive_ds.cli import main; sys.exit(main())"]
    return subprocess.run([*command, *arguments], capture_output=True, text=True)


def exit_code(*arguments: str) -> int | str | None:
    """Exit code of the command, run in this process."""
    try:
        return main(arguments)
    except SystemExit as exit:
        return exit.code


def test_help_is_quick_and_imports_nothing_heavy():
    def seconds() -> float:
        start = time.perf_counter()
        assert run("--help").returncode == 0
        return time.perf_counter() - start

    assert min(seconds() for _ in range(3)) < 1
    code = "import sys; from hive_ds.cli import build_parser; build_parser(); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert HEAVY.isdisjoint(loaded)


@pytest.mark.parametrize(
    "command",
    [
        *("", "quickstart", "recipe", "recipe list", "recipe show"),
        *(
            "data",
            "data scenes",
            "data convert",
            "data verify",
            "data stats",
            "data show",
            "data recaption",
            "data speed",
            "hosts",
            "hosts check",
            "hosts env",
            "hosts run",
            "supervise",
            "checkpoint",
            "checkpoint list",
            "checkpoint verify",
            "checkpoint reshard",
            "export",
            "export encoder",
            "probe",
            "chat",
            "report",
            "doctor",
            "analyze",
            "analyze gradients",
            "analyze attention",
            "analyze flow",
        ),
    ],
)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]):
    assert exit_code(*command.split(), "--help") == 0
    assert capsys.readouterr().out.startswith(f"usage: hive-ds {command}".rstrip())


def test_recipe_list_names_every_recipe(capsys: pytest.CaptureFixture[str]):
    assert main(["recipe", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines[: len(recipe_names())]] == recipe_names()


def test_recipe_show_prints_a_recipe_with_origins(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["recipe", "show", "tiny", "--set", "training.seed=7", "--set", "model.rope=1d"]) == 0
    shown = capsys.readouterr().out
    (tmp_path / "shown.yaml").write_text(shown)
    assert load_recipe(tmp_path / "shown.yaml") == load_recipe("tiny", ["training.seed=7", "model.rope=1d"])
    rows = [line.split("# ") for line in shown.splitlines() if "# " in line]
    assert len({len(value) for value, _ in rows if len(value) < 60}) <= 1 + sum("description" in v for v, _ in rows)
    origins = {value.split(":")[0].strip(): origin for value, origin in rows}
    assert (origins["seed"], origins["rope"], origins["attention_backend"]) == ("--set", "--set", "default")
    assert origins["precision"].startswith("tiny.yaml:")


def test_data_commands_write_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["data", "scenes", f"{tmp_path}/scenes", "--num", "2", "--seed", "3"]) == 0
    assert (tmp_path / "scenes" / "train" / "index.json").is_file()
    assert f"wrote 2 scenes to {tmp_path}/scenes/train" in capsys.readouterr().out
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no picture")
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "red"}]
    samples = [{"id": name, "image": f"{name}.png", "conversations": turns} for name in "ab"]
    (tmp_path / "samples.json").write_text(json.dumps(samples))
    command = ["data", "convert", f"{tmp_path}/samples.json", f"{tmp_path}/converted", "--images", str(tmp_path)]
    assert main([*command, "--max-reject-share", "0.5"]) == 0
    assert "1 samples, 1 images" in capsys.readouterr().out
    (rejected,) = (tmp_path / "converted" / "rejects.jsonl").read_text().splitlines()
    assert json.loads(rejected)["id"] == "b"


PICTURE = ("--image", "{tmp}/none.png", "--text", "red")
WRONG = {
    "unknown recipe": (["recipe", "show", "tinny"], "recipe tinny: expected one of"),
    "unknown key": (["recipe", "show", "tiny", "--set", "model.qknorm=none"], "unknown key model.qknorm"),
    "wrong value": (["recipe", "show", "tiny", "--set", "model.rope=3d"], "expected one of 2d, 1d"),
    "no command": ([], "the following arguments are required: COMMAND"),
    "unknown command": (["recipes"], "invalid choice: 'recipes'"),
    "a launcher's": (
        ["train", "--recipe", "tiny", "--run", "a b"],
        "run: deepspeed --module hive_ds.train --recipe tiny --run 'a b'",
    ),
    "train": (["train"], "deepspeed --module hive_ds.train --recipe NAME --stage 1 --run FOLDER"),
    "not a number": (["data", "scenes", "out", "--num", "many"], "invalid int value: 'many'"),
    "no scenes": (["data", "scenes", "{tmp}/out", "--num", "0"], "num is 0, expected at least 1"),
    "missing json": (["data", "convert", "{tmp}/none.json", "{tmp}/out"], "none.json"),
    "empty dataset": (["data", "convert", "{tmp}/empty.json", "{tmp}/out"], "empty.json"),
    "missing images": (["data", "convert", "{tmp}/one.json", "{tmp}/out", "--images", "{tmp}/none"], "{tmp}/none"),
    "no hostfile": (["hosts", "check", "{tmp}/hosts"], "hostfile {tmp}/hosts: cannot be read"),
    "empty hostfile": (["hosts", "env", "{tmp}/no_hosts", "--out", "{tmp}/out"], "holds no host"),
    "no stage": (["checkpoint", "list", "{tmp}"], "run {tmp}: holds no stage folder"),
    "no checkpoint": (["checkpoint", "verify", "{tmp}"], "{tmp}: neither a checkpoint"),
    "nothing to reshard": (["checkpoint", "reshard", "{tmp}/a", "{tmp}/out", "--ranks", "2"], "checkpoint {tmp}/a: no"),
    "no stage to supervise": (["supervise", "--", "true", "--run", "a"], "true --run a: expected a training command"),
    "no model": (["export", "encoder", "{tmp}", "{tmp}/out"], "holds neither a model"),
    "no checkpoint to ask": (["chat", "{tmp}/none", "hm?"], "{tmp}/none: no such folder"),
    "no picture": (["chat", "{tmp}", "hm?", "--image", "{tmp}/none.png"], "image {tmp}/none.png: No such file"),
    "not a picture": (["chat", "{tmp}", "hm?", "--image", "{tmp}/one.json"], "one.json: image of"),
    "no beams": (["chat", "{tmp}", "hm?", "--beams", "0"], "beams is 0, expected at least 1"),
    "no folder for a map": (["chat", "{tmp}", "--map", "{tmp}/out/map.png"], "there is no folder {tmp}/out"),
    "map without picture": (["chat", "{tmp}", "hm?", "--map", "{tmp}/map.png"], "--map without --image"),
    "nothing to analyze": (["analyze", "gradients", "{tmp}", *PICTURE], "image {tmp}/none.png: No such file"),
    "no folder for a picture": (
        ["analyze", "attention", "{tmp}", *PICTURE, "--out", "{tmp}/out/map.png"],
        "there is no folder {tmp}/out",
    ),
    "folder for a picture": (["analyze", "flow", "{tmp}", "--data", "{tmp}", "--out", "{tmp}"], "{tmp}: is a folder;"),
    "folder for a map": (["chat", "{tmp}", "--map", "{tmp}"], "{tmp}: is a folder; expected the name of a file"),
    "folder for figures": (["cost", "{tmp}/none.yaml", "--json", "{tmp}"], "{tmp}: is a folder; expected the name"),
    "no text to analyze": (["analyze", "flow", "{tmp}", "--image", "{tmp}/a.png"], "either --data, or --image and"),
    "question of data": (
        ["analyze", "flow", "{tmp}", "--data", "{tmp}", "--question", "hm?"],
        "either --data, or --image",
    ),
    "page that is none": (["data", "stats", "{tmp}", "--out", "{tmp}/out"], "expected a name that ends in .html"),
    "too few samples": (
        ["analyze", "flow", "{tmp}", "--data", "{tmp}", "--samples", "0"],
        "--samples 0: expected a number of at least 1",
    ),
    "no port": (["chat", "{tmp}", "--browser", "--port", "65536"], "65536 is no port; expected 1 to 65535"),
    "no failures": (
        ["supervise", "--failures", "0", "--folder", "{tmp}/out", "--", "true"],
        "--failures 0: expected a",
    ),
    "no jobs": (["ablate", "run", "tiny", "{tmp}/out", "--jobs", "0"], "--jobs 0: expected a number of at least 1"),
    "no seed": (["quickstart", "--out", "{tmp}/out", "--seed", "-1"], "--seed -1: expected from 0 to 2**63 - 1"),
    "no pause": (["supervise", "--pause", "nan", "--folder", "{tmp}/out", "--", "true"], "--pause nan: expected a num"),
    "hosts in bytes": (["hosts", "env", "{tmp}/bytes"], "{tmp}/bytes: cannot be read (not UTF-8 text); expected lines"),
    "page with a question": (["chat", "{tmp}", "hm?", "--browser"], "--browser with QUESTION"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_line_and_exit_code_2(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    sample = {"id": "a", "image": "a.jpg", "conversations": [{"from": "human", "value": "<image>"}]}
    (tmp_path / "one.json").write_text(json.dumps([sample]))
    (tmp_path / "empty.json").write_text("[]")
    (tmp_path / "no_hosts").write_text("# none\n\n")
    (tmp_path / "bytes").write_bytes(b"\xff")
    arguments, expected = WRONG[case]
    assert exit_code(*(argument.format(tmp=tmp_path) for argument in arguments)) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    assert expected.format(tmp=tmp_path) in printed.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", ["before", "after"])
def test_debug_shows_the_trace(place: str):
    command = ["recipe", "show", "tinny"]
    done = run("--debug", *command) if place == "before" else run(*command, "--debug")
    assert done.returncode == 2
    assert "Traceback" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: recipe tinny")


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        *((OSError(n, os.strerror(n), "/a/file"), 2, f"error: /a/file: {os.strerror(n)}") for n in WRONG_PATHS),
        (OSError(28, "No space left on device", "/a/file"), 1, "error: /a/file: No space left on device"),
        (OSError("the disk is away"), 1, "error: the disk is away"),
        (OutsideError("/a/file: the disk is full"), 1, "error: /a/file: the disk is full"),
        (MemoryError(), 1, "error: out of memory"),
        (RuntimeError("CUDA out of memory."), 1, "error: CUDA out of memory."),
        (NO_MEMORY, 1, "error: [enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes"),
        (KeyboardInterrupt(), 130, "\nstopped"),
    ],
)
def test_what_fails_outside_is_one_line(
    error: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def command() -> None:
        raise error

    assert run_command(command) == code
    assert capsys.readouterr().err == f"{line}\n"


@pytest.mark.parametrize("buffered", [True, False])
def test_nothing_is_said_to_a_pipe_that_nobody_reads(buffered: bool) -> None:
    """As ``| head`` leaves it, or ``| tee`` at Ctrl-C; another pipe that breaks is an error."""
    command = "import sys; from hive_ds.errors import run_command; sys.exit(run_command(lambda: print(1)))"
    socket = command.replace("print(1)", "(_ for _ in ()).throw(BrokenPipeError(32, 'Broken pipe'))")
    stopped = command.replace("print(1)", f"[{buffered} and print(1), (_ for _ in ()).throw(KeyboardInterrupt)]")
    cases = ((command, 141, ""), (socket, 1, "error: [Errno 32] Broken pipe\n"), (stopped, 130, "\nstopped\n"))
    for program, code, said in cases:
        reader, writer = os.pipe()
        if code != 1:
            os.close(reader)
        environ = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
        python = [sys.executable, *([] if buffered else ["-u"]), "-c", program]
        done = subprocess.run(python, stdout=writer, stderr=subprocess.PIPE, text=True, env=environ)
        assert (done.returncode, done.stderr) == (code, said)


def test_an_error_of_the_program_keeps_its_trace() -> None:
    assert (run_command(lambda: None), run_command(lambda: 85)) == (0, 85)

    def command() -> None:
        raise RuntimeError("a mistake of ours")

    with pytest.raises(RuntimeError, match="a mistake of ours"):
        run_command(command)


@pytest.mark.parametrize(
    "error",
    [NO_MEMORY, MemoryError("a"), OSError(28, "No space left on device", "/a/file"), OutsideError("a"), HiveError("a")],
)
def test_what_fails_outside_says_nothing_of_a_file(error: Exception) -> None:
    """Else a job whose node had no memory would not be tried again."""
    with pytest.raises(type(error)) as caught, told_as("model a does not load", "a whole model"):
        raise error
    assert caught.value is error


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError("no config.json.\nNone at all."), "no config.json. None at all"),  # of transformers
        (ValueError("a picture of an out of memory"), "a picture of an out of memory"),
        (TypeError("x" * 301), f"TypeError: {'x' * 300} ..."),
    ],
)
def test_what_a_library_cannot_read_is_one_line(error: Exception, reason: str) -> None:
    with pytest.raises(HiveError) as caught, told_as("model a does not load", "a whole model"):
        raise error
    assert str(caught.value) == f"model a does not load: {reason}; expected a whole model"
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(("number", "code"), [(errno.EACCES, 2), (errno.EROFS, 2), (errno.ENOSPC, 1), (errno.EIO, 1)])
def test_what_cannot_be_written_has_the_exit_code_of_its_cause(number: int, code: int, tmp_path: Path) -> None:
    with pytest.raises(HiveError, match="cannot be written") as caught, must_write(tmp_path, "make room"):
        raise OSError(number, os.strerror(number))
    assert caught.value.exit_code == code


def test_what_cannot_be_written_is_what_it_was(tmp_path: Path) -> None:
    file = tmp_path / "file"
    write_whole(file, "before")
    with full_disk(100), pytest.raises(OSError, match="File too large") as caught:
        write_whole(file, "x" * 200)
    assert caught.value.filename == str(file)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "before")]


def test_links_and_pipes_stay_what_they_are(tmp_path: Path) -> None:
    """Root, told to write to /dev/null, had put a file there."""
    link, pipe = tmp_path / "link", tmp_path / "pipe"
    link.symlink_to("file")
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    for path in (link, pipe):
        write_whole(path, "text")
    assert link.is_symlink()
    assert (tmp_path / "file").read_text() == "text"
    assert pipe.is_fifo()
    assert os.read(reader, 100) == b"text"
    os.close(reader)
