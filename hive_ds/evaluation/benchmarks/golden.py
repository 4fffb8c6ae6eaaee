"""Golden cases: the exact prompt of a question, and what lmms-eval's scorer makes of some answers, for every version.

They are checked before every evaluation, so that another release of lmms-eval, or a changed task file, cannot change a
prompt or a score unseen: ScienceQA gives 37 instead of 70 when asked in a wrong way.
"""

from __future__ import annotations

import copy
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hive_ds.errors import HiveError
from hive_ds.evaluation.benchmarks.catalogue import Benchmark

GOLDEN = Path(__file__).parent / "golden"


def check_golden(benchmark: Benchmark, task: Any) -> None:
    """Compare a task, as lmms-eval has loaded it, with the golden file of its version.

    Raises:
        HiveError: a prompt or a score differs, or the task's version has no golden file.
    """
    wanted = str(task.VERSION)
    path = GOLDEN / f"{wanted}.json"
    if not path.is_file():
        raise HiveError(f"{benchmark.name}: prompt version {wanted} has no golden file {path}")
    golden = json.loads(path.read_text())
    blame = f"lmms-eval {version('lmms-eval')} or the task file has changed; expected what {path.name} says"
    for case in golden["cases"]:
        prompt = task.doc_to_text(copy.deepcopy(case["doc"]))
        if prompt != case["prompt"]:
            raise HiveError(f"{benchmark.name}: the prompt is {prompt!r} and not {case['prompt']!r}: {blame}")
        for answer, score in case["scores"].items():
            metric = task.process_results(copy.deepcopy(case["doc"]), [answer])[case["metric"]]
            found = float(metric["score"] if isinstance(metric, dict) else metric)
            if found != score:
                raise HiveError(f"{benchmark.name}: the answer {answer!r} scores {found} and not {score}: {blame}")
