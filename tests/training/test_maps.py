"""Pictures of maps that cannot be written; what maps leave of the training is checked on ranks, in maps_checks.py."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image
from tiny_data import make_image_processor, make_samples, make_tokenizer

from hive_ds.processing import HiveProcessor
from hive_ds.training.maps import SampleMaps


def test_maps_that_cannot_be_written_do_not_end_the_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    processor = HiveProcessor(make_image_processor(), make_tokenizer("llama3"))
    maps = SampleMaps(tmp_path / "maps", make_samples(1)[0], processor, "plain")
    picture = {"gradients": Image.new("RGB", (4, 4))}
    maps.folder.write_text("in the way")
    maps.write(picture, 7)
    assert "warning: step 7: no maps could be written" in capsys.readouterr().out
    maps.folder.unlink()
    maps.write(picture, 8)
    assert [path.name for path in maps.folder.iterdir()] == ["step-000008-gradients.png"]
