from __future__ import annotations

import ast
from pathlib import Path

import pytest
from walls import violations

ROOT = Path(__file__).resolve().parents[2]
MOST_FILE_LINES = 320
MOST_FUNCTION_LINES = 70


def test_no_wall_is_crossed():
    assert violations(ROOT) == []


PLANTED = {
    "kernels/hive_kernels/op.py": (
        "def f():\n    from hive_ds.errors import HiveError\n",
        "kernels import hive_ds.errors.HiveError",
    ),
    "kernels/hive_kernels/reference.py": ("import transformers\n", "kernels import transformers"),
    "kernels/__init__.py": ("", "must not exist"),
    "hive_ds/data/batch.py": ("from ..model import routes\n", "hive_ds.data reaches hive_ds.model"),
    "hive_ds/data/images.py": (
        "import hive_ds.errors\nfrom hive_ds import bridge\n",
        "hive_ds.bridge -> hive_ds.model.hive",
    ),
    "hive_ds/model/hive.py": ("from hive_ds.data.batch import collate\n", "hive_ds.model reaches hive_ds.data"),
    "hive_ds/evaluation/answers.py": ("from hive_ds import train\n", "hive_ds.evaluation reaches hive_ds.train"),
    "hive_ds/analysis/cost.py": (
        "import importlib\nimportlib.import_module('hive_ds.training.loop')\n",
        "hive_ds.analysis reaches",
    ),
    "hive_ds/export.py": ("from .training import checkpoint\n", "hive_ds.export reaches hive_ds.training"),
    "hive_ds/training/loop.py": (
        "def f():\n    import deepspeed.comm as dist\n",
        "loop.py:2: deepspeed is imported outside",
    ),
    "hive_ds/data/loader.py": ("from streaming import StreamingDataset\n", "streaming is imported outside"),
}


@pytest.mark.parametrize("path", PLANTED)
def test_a_crossing_is_found(path: str, tmp_path: Path):
    allowed = {
        "hive_ds/bridge.py": "from hive_ds.model.hive import HiveForCausalLM\n",
        "hive_ds/model/hive.py": "from hive_ds.kernels import finish_keys\nfrom . import routes\n",
        "hive_ds/training/engine.py": "import deepspeed\nfrom hive_ds.data import mds\nimport hive_ds.model.hive\n",
        "hive_ds/data/mds/folder.py": "import streaming\nfrom .schema import Sample\n",
        "kernels/hive_kernels/layout.py": "import math\nimport numpy as np\nimport torch.nn\nfrom .op import attend\n",
    }
    for name, text in allowed.items():
        _write(tmp_path / name, text)
    assert violations(tmp_path) == []
    text, expected = PLANTED[path]
    _write(tmp_path / path, text)
    found = violations(tmp_path)
    assert len(found) == 1
    assert expected in found[0]
    assert found[0].startswith(path)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def _sources() -> dict[str, str]:
    folders = (ROOT / "hive_ds", ROOT / "kernels", ROOT / "docs", ROOT / "tests")
    paths = [ROOT / "setup.py", *(path for folder in folders for path in sorted(folder.rglob("*.py")))]
    return {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in paths}


def test_sources_are_of_python_3_10():
    assert [name for name, text in _sources().items() if not ast.parse(text, name, feature_version=(3, 10))] == []
    with pytest.raises(SyntaxError):
        ast.parse("type A = int", feature_version=(3, 10))


def test_files_are_short():
    lengths = {name: len(text.splitlines()) for name, text in _sources().items()}
    assert {name: length for name, length in lengths.items() if length >= MOST_FILE_LINES} == {}


def test_functions_are_short():
    lengths = {
        f"{name}:{function.lineno} {function.name}": _code_lines(function)
        for name, text in _sources().items()
        for function in ast.walk(ast.parse(text))
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
    }
    assert {name: length for name, length in lengths.items() if length >= MOST_FUNCTION_LINES} == {}


def _code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its docstring, which a public call may need at length."""
    first = function.body[0]
    documented = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and len(function.body) > 1
    docstring = first.end_lineno - first.lineno + 1 if documented else 0
    return function.end_lineno - function.lineno + 1 - docstring
