"""`make gpu-suite PART=...`: one command a part, each under nine minutes, from a clone without a network.

``checks`` and ``bench`` need torch, triton, pytest, pytest-benchmark and hypothesis, and neither hive-ds installed nor
what else it depends on. ``stage1``, ``stage2`` and ``stage3`` time a training step; they need transformers, and for
the rows of its engine DeepSpeed. Without a GPU all runs on tiny shapes, our kernel under Triton's interpreter.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from xml.etree import ElementTree

import torch

from . import records

SECONDS = float(os.environ.get("HIVE_SUITE_SECONDS") or 500)
"""For all steps of a part together."""
RESERVE = 90.0
"""Of these, left to end the shape that is being timed: compiling its peers takes a minute."""
GRACE = 20.0
"""Beyond that, for a step that outlasts its limit to print what it has."""
SANITIZER_FAILURE = 9
STAGES = ("stage1", "stage2", "stage3")


@dataclass
class Step:
    """One command of a part, and what came of it."""

    name: str
    command: list[str]
    limit: float
    environment: dict[str, str] = field(default_factory=dict)
    verdict: str = "not run"
    """"passed", "failed", "timed out", "interrupted" or "not run"."""
    detail: str = ""
    seconds: float = 0.0
    tests: dict[str, int] = field(default_factory=dict)

    def run(self, environment: dict[str, str], folder: Path, left: float) -> None:
        """Run it in ``folder``, its output to this terminal, for no longer than ``left`` seconds."""
        print(f"\n=== {self.name}", flush=True)
        start = time.perf_counter()
        # A group of its own: a run that outlasts its limit is ended with all that it started.
        process = subprocess.Popen(
            self.command,
            env=environment | self.environment,
            cwd=folder,
            start_new_session=True,
            preexec_fn=_hear_interrupts,
        )
        try:
            code = process.wait(timeout=max(1.0, min(self.limit, left)))
            self.verdict = "passed" if code == 0 else "failed"
            self.detail = "" if code == 0 else f"exit status {code}"
        except subprocess.TimeoutExpired:
            _end(process)
            self.verdict, self.detail = "timed out", f"after {min(self.limit, left):.0f} s"
        except KeyboardInterrupt:
            _end(process)
            self.verdict, self.detail = "interrupted", ""
        self.seconds = round(time.perf_counter() - start, 1)


def _hear_interrupts() -> None:
    """What nohup and background jobs of a shell ignore, programs that they start ignore too."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _stop(*_: object) -> None:
    """SIGTERM, of `timeout` or a scheduler: as Ctrl-C, once; make sends it on, and `timeout` sends it to both."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


def _end(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGINT)  # pytest ends with its summary
    try:
        process.wait(timeout=GRACE)
    except subprocess.TimeoutExpired:
        pass
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def importable(folder: Path) -> Path:
    """A tree of links in ``folder`` from which ``hive_ds`` and ``hive_ds.kernels`` of this clone import."""
    package = folder / "hive_ds"
    package.mkdir()
    for entry in (records.ROOT / "hive_ds").iterdir():
        if entry.name not in ("__pycache__", "kernels"):
            (package / entry.name).symlink_to(entry)
    (package / "kernels").symlink_to(records.ROOT / "kernels" / "hive_kernels")
    return folder


def child_environment(tree: Path, part: str) -> dict[str, str]:
    """Environment of every step: imports from this clone, then as before; the interpreter where there is no GPU."""
    environment = dict(os.environ)
    before = [str(Path(path).absolute()) for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    environment["PYTHONPATH"] = os.pathsep.join([str(tree), str(records.ROOT / "kernels"), *before])
    environment["PYTHONSAFEPATH"] = "1"  # the clone's hive_ds/ has no kernels/: the current folder must not be searched
    if environment.get("OUT"):
        environment["OUT"] = str(Path(environment["OUT"]).absolute())
    given = {name: os.environ.get(name) for name in ("SHAPES", "STEP")}
    given["SECONDS"] = os.environ.get("HIVE_SUITE_SECONDS")
    chosen = "".join(f" {name}={shlex.quote(value)}" for name, value in given.items() if value)
    environment["HIVE_SUITE_COMMAND"] = f"make gpu-suite PART={part}{chosen}"
    if os.environ.get("SHAPES"):
        environment["HIVE_BENCH_SHAPES"] = os.environ["SHAPES"]
    environment["HIVE_BENCH_SECONDS"] = str(SECONDS - RESERVE)
    cuda = torch.cuda.is_available()
    return environment | ({"TRITON_INTERPRET": "0"} if cuda else {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"})


def pytest_step(name: str, limit: float, xml: Path, *arguments: str) -> Step:
    """A run of pytest with this repository's settings, whatever the current folder."""
    root = records.ROOT
    command = [sys.executable, "-m", "pytest", "-c", str(root / "pyproject.toml"), "--rootdir", str(root)]
    command += ["-q", "-rfE", "--benchmark-quiet", "--tb=short", f"--junitxml={xml}", *arguments]
    return Step(name, command, limit)


def checks(xml: Path) -> list[Step]:
    """GPU tests, every peer against the reference, and the sanitizer over small shapes."""
    root = records.ROOT
    small = [sys.executable, "-m", "benchmarks.small"]
    steps = [
        pytest_step(
            "gpu tests", 270, xml / "gpu.xml", "-m", "gpu and not long", str(root / "tests" / "kernels"), *_many(12)
        ),
        pytest_step(
            "agreement", 150, xml / "agreement.xml", "-k", "agrees", str(root / "kernels" / "benchmarks"), *_many(3)
        ),
        Step("small shapes", small, 120),
    ]
    for tool in ("memcheck", "racecheck"):
        command = [_sanitizer(), "--tool", tool, "--error-exitcode", str(SANITIZER_FAILURE), *small, "--few"]
        # Without the allocator's cache each tensor is an allocation, and a read beyond it is seen.
        steps.append(Step(tool, command, 120, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}))
    return steps


def _many(processes: int) -> list[str]:
    """Nearly all of a check on a GPU is compilation, on the CPU: side by side, where pytest-xdist is there.

    Three at most of those that take 20 GB for a long shape: pytest-xdist's groups, for one process each, do nothing
    under pytest 9.2.
    """
    if not torch.cuda.is_available() or importlib.util.find_spec("xdist") is None:
        return []
    return ["-n", str(min(processes, os.cpu_count() or 1))]


def bench(xml: Path) -> list[Step]:
    """The benchmark, which checks every peer on every shape before it times it."""
    return [pytest_step("benchmark", SECONDS, xml / "bench.xml", str(records.ROOT / "kernels" / "benchmarks"))]


def training(part: str, out: Path) -> list[Step]:
    """The training step of a stage, which looks at the clock itself."""
    command = [sys.executable, "-m", "hive_ds.benchmarks.step", part.removeprefix("stage"), "--out", str(out)]
    chosen = shlex.split(os.environ.get("STEP", ""))
    command += ["--seconds", str(SECONDS - GRACE), "--until", str(time.perf_counter() + SECONDS - GRACE)]
    return [Step("training step", [*command, *chosen], SECONDS)]


def write_training(part: str, step: Step, out: Path, command: str) -> None:
    """The result file of a stage, as far as it came; ``step`` is red if it timed nothing."""
    rows = []
    if out.exists():
        record = records.describe(part) | json.loads(out.read_text(encoding="utf-8")) | {"command": command}
        rows = record["rows"]
        print(f"result file: {records.write(record)}")
    if step.verdict == "passed" and not any("seconds" in row for row in rows):
        step.verdict, step.detail = "failed", "nothing was timed"


def run(steps: list[Step], environment: dict[str, str], tree: Path) -> None:
    """Every step in turn, until the time for all is used up or one is interrupted."""
    deadline = time.perf_counter() + SECONDS
    for step in steps:
        left = deadline - time.perf_counter()
        sanitizing = step.name in ("memcheck", "racecheck")
        if left < 5:
            step.verdict, step.detail = "timed out", "no time left for it"
        elif sanitizing and not torch.cuda.is_available():
            step.detail = "no GPU"
        elif sanitizing and shutil.which(step.command[0]) is None:
            step.detail = "compute-sanitizer is not installed"
        else:
            step.run(environment, tree, left)
            _count_tests(step)
            if step.verdict == "interrupted":
                break


def _count_tests(step: Step) -> None:
    name = next((a.partition("=")[2] for a in step.command if a.startswith("--junitxml=")), "")
    if not name or not Path(name).exists():
        return
    suites = ElementTree.parse(name).getroot().iter("testsuite")
    for suite in suites:
        for key in ("tests", "failures", "errors", "skipped"):
            step.tests[key] = step.tests.get(key, 0) + int(suite.get(key, "0"))
    if step.verdict == "passed" and step.tests["tests"] == step.tests["skipped"] and torch.cuda.is_available():
        step.verdict, step.detail = "failed", "every test was skipped on a machine with a GPU"


def _of_any_machine(word: str, xml: Path) -> str:
    """A word of a command without this machine's folders."""
    return word.replace(str(xml.parent), "").replace(str(records.ROOT), ".").replace(sys.executable, "python")


def _sanitizer() -> str:
    known = "/usr/local/cuda/bin/compute-sanitizer"
    return shutil.which("compute-sanitizer") or (known if Path(known).exists() else "compute-sanitizer")


def main() -> int:
    """Run one part; 0 only if every step that ran passed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("part", choices=("checks", "bench", *STAGES))
    part = parser.parse_args().part
    signal.signal(signal.SIGTERM, _stop)
    with tempfile.TemporaryDirectory() as name:
        xml = Path(name) / "xml"
        tree = Path(name) / "tree"
        tree.mkdir()
        environment = child_environment(importable(tree), part)
        result = Path(name) / "step.json"
        if part in STAGES:
            steps = training(part, result)
            environment["TRITON_INTERPRET"] = "0"  # tiny models attend by SDPA
        else:
            steps = checks(xml) if part == "checks" else bench(xml)
        run(steps, environment, tree)
        if part in STAGES:
            write_training(part, steps[0], result, environment["HIVE_SUITE_COMMAND"])
    print()
    for step in steps:
        counts = ", ".join(f"{count} {key}" for key, count in step.tests.items())
        print(f"{step.name}: {step.verdict} {step.detail} {counts} ({step.seconds} s)")
    green = all(step.verdict in ("passed", "not run") for step in steps)
    if part == "checks":
        record = records.describe("checks") | {"green": green, "tiny": not torch.cuda.is_available()}
        record["command"] = environment["HIVE_SUITE_COMMAND"]
        for step in steps:
            step.command = [Path(step.command[0]).name, *(_of_any_machine(word, xml) for word in step.command[1:])]
        record["steps"] = [asdict(step) for step in steps]
        print(f"result file: {records.write(record)}")
    return 0 if green else 1


if __name__ == "__main__":
    sys.exit(main())
