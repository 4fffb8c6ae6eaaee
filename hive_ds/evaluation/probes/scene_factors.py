"""Factors of generated scenes as labels of their pictures, to see what of a picture an encoder's blocks tell.

A factor labels only pictures where it has one answer: ``colour``, ``shape`` and ``size`` where all items share it,
``relation`` where there are two of different shapes in one row or column, ``text`` where there is a word. Relation
says where the item whose shape comes first in the alphabet lies from the other: positions alone do not tell it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hive_ds.data.scenes import Item, direction
from hive_ds.data.schema import Sample
from hive_ds.errors import HiveError, require_one_of
from hive_ds.evaluation.probes.data import LabelledImages, ProbeData

FACTORS = ("colour", "shape", "size", "count", "relation", "text")


def scene_probe_data(train: Sequence[Sample], test: Sequence[Sample], factors: Sequence[str] = FACTORS) -> ProbeData:
    """Probe data of scene samples (`hive_ds.data.scenes_samples`), one task a factor.

    HiveError for an unknown factor, or a sample that is no scene.
    """
    for factor in factors:
        require_one_of("factor", factor, FACTORS)
    return ProbeData("scenes", _labelled("scenes train", train, factors), _labelled("scenes test", test, factors))


def scene_factors(scene: Mapping[str, Any]) -> dict[str, str | None]:
    """Factor -> its value in a scene as `Scene.as_dict` writes it; None where it does not apply."""
    items = [Item(**item) for item in scene["items"]]
    return {
        "colour": _shared(item.colour for item in items),
        "shape": _shared(item.shape for item in items),
        "size": _shared(item.size for item in items),
        "count": str(len(items)),
        "relation": _relation(items),
        "text": scene["word"],
    }


def _labelled(name: str, samples: Sequence[Sample], factors: Sequence[str]) -> LabelledImages:
    rows = []
    for sample in samples:
        scene = sample.meta.get("scene")
        if scene is None or len(sample.images) != 1:
            raise HiveError(f"{name}: sample {sample.id!r} is no scene; expected one picture and meta['scene']")
        rows.append(scene_factors(scene))
    labels = {factor: [row[factor] for row in rows] for factor in factors}
    return LabelledImages.from_files(name, [sample.images[0] for sample in samples], labels)


def _shared(values: Any) -> str | None:
    distinct = set(values)
    return distinct.pop() if len(distinct) == 1 else None


def _relation(items: Sequence[Item]) -> str | None:
    if len(items) != 2 or items[0].shape == items[1].shape:
        return None
    first, second = sorted(items, key=lambda item: item.shape)
    return direction(first, second)
