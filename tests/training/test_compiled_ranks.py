"""`training.compile` with Inductor under every ZeRO stage: the same losses, and no compilation for new lengths."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from ranks import check_names, launch_checks, passed


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler: apt-get install g++")
def test_compiled_blocks_train_as_others_do(tmp_path: Path) -> None:
    names = check_names("compile_checks")
    verdicts = launch_checks(names, 2, tmp_path)
    for name in names:
        passed(verdicts[name])
