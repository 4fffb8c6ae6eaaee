"""Which part of the code may import which: the walls of CONTRIBUTING.md, checked on the syntax tree.

Imports inside functions count. A wall between two parts of hive_ds also holds through third modules: what `data`
imports may not import `model` either.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

KERNEL_LIBRARIES = frozenset({"torch", "triton", "numpy", "hive_ds.kernels"}) | sys.stdlib_module_names

FORBIDDEN = {
    "hive_ds.data": ("hive_ds.model",),
    "hive_ds.model": ("hive_ds.data",),
    "hive_ds.evaluation": ("hive_ds.training", "hive_ds.train"),
    "hive_ds.analysis": ("hive_ds.training", "hive_ds.train"),
    "hive_ds.export": ("hive_ds.training", "hive_ds.train"),
}
"""Part -> what it must not reach."""

SINGLE_PLACE = {"deepspeed": "hive_ds.training.engine", "streaming": "hive_ds.data.mds"}
"""Library -> the one module, or package, that imports it."""


@dataclass(frozen=True)
class Import:
    """One imported name, absolute: ``from a import b`` gives ``a.b``."""

    target: str
    line: int


def violations(root: Path) -> list[str]:
    """Every crossing in the tree at ``root``, one line each: the file, its line and the wall."""
    modules = {name: path for name, path in _modules(root)}
    imports = {name: list(_imports(name, path)) for name, path in modules.items()}
    found = []
    if (root / "kernels" / "__init__.py").exists():
        found.append("kernels/__init__.py: must not exist, it would shadow PyPI's package of that name")
    for name, path in modules.items():
        where = path.relative_to(root)
        for one in imports[name]:
            if _inside(name, "hive_ds.kernels") and not any(_inside(one.target, ok) for ok in KERNEL_LIBRARIES):
                found.append(f"{where}:{one.line}: kernels import {one.target}")
            found += [
                f"{where}:{one.line}: {library} is imported outside {place}"
                for library, place in SINGLE_PLACE.items()
                if _inside(one.target, library) and not _inside(name, place)
            ]
        for part, targets in FORBIDDEN.items():
            if _inside(name, part):
                chains = (_chain(name, target, imports) for target in targets)
                found += [f"{where}: {part} reaches {chain[-1]}: {' -> '.join(chain)}" for chain in chains if chain]
    return found


def _modules(root: Path) -> Iterator[tuple[str, Path]]:
    for folder, package in ((root / "hive_ds", "hive_ds"), (root / "kernels" / "hive_kernels", "hive_ds.kernels")):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            yield ".".join([package, *(part for part in parts if part != "__init__")]), path


def _imports(module: str, path: Path) -> Iterator[Import]:
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level > 1 else package
            start = ".".join(filter(None, [base if node.level else "", node.module]))
            yield from (Import(f"{start}.{alias.name}", node.lineno) for alias in node.names)
        elif isinstance(node, ast.Call) and _is_dynamic_import(node.func) and node.args:
            name = node.args[0]
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                yield Import(name.value, node.lineno)


def _is_dynamic_import(function: ast.expr) -> bool:
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    return name in {"import_module", "__import__"}


def _inside(name: str, part: str) -> bool:
    return name == part or name.startswith(f"{part}.")


def _chain(start: str, target: str, imports: dict[str, list[Import]]) -> list[str] | None:
    """The first way of imports from ``start`` into ``target``, as module names."""
    ways = {start: [start]}
    queue = [start]
    while queue:
        name = queue.pop(0)
        for one in imports[name]:
            module = one.target if one.target in imports else one.target.rpartition(".")[0]
            if _inside(one.target, target):
                return [*ways[name], one.target]
            if module in imports and module not in ways:
                ways[module] = [*ways[name], module]
                queue.append(module)
    return None
