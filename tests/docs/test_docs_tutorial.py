"""The tutorial is pasted as it stands, on two CPU ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
from doc_pages import ROOT
from tutorial import ALONE, SLURM, SSH, paste, sections


def test_every_section_is_pasted_by_a_test():
    assert set(sections()) == {"", *ALONE, SLURM, SSH}
    cluster = (ROOT / "tests" / "cluster" / "test_tutorial_cluster.py").read_text()
    assert "SLURM" in cluster
    assert "SSH" in cluster


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_tutorial_on_one_machine(tmp_path: Path):
    printed = {number: [paste(block, tmp_path) for block in sections()[number]] for number in ALONE}
    tiny, large = printed["3."]
    assert all(
        "vision_blocks: [1, 2, 3] " in shown and "language_layers: [1, 2, 3] " in shown for shown in (tiny, large)
    )
    assert "vlm_alignment" not in large
    assert "stage 3 is done" in printed["4."][0]
    assert '"event": "end"' in printed["4."][1]
    assert "torch.Size([1, 16, 48])" in printed["5."][1]
    assert (tmp_path / "runs" / "tutorial" / "show.html").is_file()
    assert (tmp_path / "runs" / "tutorial" / "run" / "encoder" / "README.md").is_file()
