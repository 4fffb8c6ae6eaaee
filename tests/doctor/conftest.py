from __future__ import annotations

import io

import pytest
from PIL import Image


@pytest.fixture
def picture() -> bytes:
    """A PNG."""
    target = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(target, "png")
    return target.getvalue()
