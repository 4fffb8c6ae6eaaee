"""Versions of Python and of the libraries, against what hive-ds and torch ask for in their package metadata."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import metadata, requires

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from hive_ds.doctor.findings import Finding
from hive_ds.launch.probe import version

AREA = "versions"
FLASH = "flash-attn"
_FLASH_USE = "only model.text_attention_backend=flash_attention_2 and model.vision_attention=flash_attention_2 use it"
Installed = Callable[[str], "str | None"]
"""Version of a package, None where it is not installed."""


def check_software(installed: Installed = version, *, flash_needed: bool = False) -> Iterator[Finding]:
    """Python, then every library that hive-ds requires; the extras streaming and flash apart.

    Args:
        installed: asks for a version.
        flash_needed: the recipe names flash-attn.
    """
    if version("hive-ds") is None:
        yield Finding(AREA, "hive-ds", "problem", "runs without being installed", "pip install -e . in its clone")
        return
    yield _python()
    for requirement in required("hive-ds", ""):
        yield _library(requirement, installed, "pip install -e .")
    for requirement in required("torch", "") if version("torch") else ():
        if requirement.name == "triton":
            yield _library(requirement, installed, "pip install --force-reinstall torch, which brings its own triton")
    for requirement in required("hive-ds", "streaming"):
        yield _library(requirement, installed, 'pip install -e ".[streaming]"; training from MDS shards needs it')
    yield _flash(installed(FLASH), flash_needed)


def required(package: str, extra: str) -> Sequence[Requirement]:
    """What an installed package requires here, of one extra only, or without any (``""``)."""
    found = [Requirement(line) for line in requires(package) or ()]
    if not extra:
        return [one for one in found if one.marker is None or one.marker.evaluate({"extra": ""})]
    without = {one.name for one in required(package, "")}
    return [one for one in found if one.marker and one.marker.evaluate({"extra": extra}) and one.name not in without]


def _python() -> Finding:
    wanted, found = metadata("hive-ds")["Requires-Python"], platform.python_version()
    if SpecifierSet(wanted).contains(found, prereleases=True):
        return Finding(AREA, "python", "ok", found)
    said = f"{found}; expected {wanted}"
    return Finding(AREA, "python", "problem", said, "make venv PYTHON=python3.12, or another that fits")


def _library(requirement: Requirement, installed: Installed, how: str) -> Finding:
    found, name = installed(requirement.name), requirement.name
    wanted = f"expected {requirement.specifier}" if requirement.specifier else "expected any version"
    if found is None:
        return Finding(AREA, name, "problem", f"not installed; {wanted}", how)
    if not requirement.specifier.contains(found, prereleases=True):
        return Finding(AREA, name, "problem", f"{found}; {wanted}", f'pip install "{name}{requirement.specifier}"')
    return Finding(AREA, name, "ok", found)


def _flash(found: str | None, needed: bool) -> Finding:
    if found is not None:
        return Finding(AREA, FLASH, "ok", found)
    if needed:
        advice = 'pip install -e ".[flash]" (needs nvcc), or leave both settings at their defaults'
        return Finding(AREA, FLASH, "problem", "not installed, but the recipe asks for it", advice)
    return Finding(AREA, FLASH, "ok", f"not installed, not needed: {_FLASH_USE}")
