"""What several of these tests read."""

from __future__ import annotations

import pytest
from tiny_data import make_tokenizer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a tokenizer with a chat template."""
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer("llama3").save_pretrained(folder)
    return str(folder)
