"""A recipe may name what the code has: no more, and no less."""

from __future__ import annotations

from typing import get_type_hints

import pytest

from hive_ds.config import DataConfig, ModelConfig
from hive_ds.data.text import IMAGE_POSITIONS, TEMPLATES
from hive_ds.kernels import BACKENDS, QK_NORMS
from hive_ds.model.flash import FLASH_BACKENDS
from hive_ds.model.positions import ROPES


@pytest.mark.parametrize(
    ("section", "field", "known"),
    [
        (ModelConfig, "qk_norm", QK_NORMS),
        (ModelConfig, "rope", ROPES),
        (ModelConfig, "attention_backend", BACKENDS),
        (ModelConfig, "text_attention_backend", (*BACKENDS, *FLASH_BACKENDS)),
        (DataConfig, "template", TEMPLATES),
        (DataConfig, "image_position", IMAGE_POSITIONS),
    ],
)
def test_choices_of_a_recipe_are_those_of_the_code(section: type, field: str, known: tuple[str, ...]) -> None:
    (check,) = get_type_hints(section, include_extras=True)[field].__metadata__
    assert sorted(check.choices) == sorted(known)
