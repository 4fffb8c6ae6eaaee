"""Data sets by name: where they are on the hub, their splits and columns, and the paper's epochs."""

from __future__ import annotations

from dataclasses import dataclass

from hive_ds.errors import require_one_of


@dataclass(frozen=True)
class Preset:
    """A data set that is known. ``epochs`` are the attentive head's."""

    hub_name: str
    train_split: str
    test_split: str
    image_column: str = "image"
    label_column: str = "label"
    epochs: int = 5


PRESETS = {
    "food101": Preset("ethz/food101", "train", "validation"),
    "caltech256": Preset("ilee0022/Caltech-256", "train", "test"),
    "imagenet1k": Preset("ILSVRC/imagenet-1k", "train", "validation", epochs=1),
    "cifar10": Preset("uoft-cs/cifar10", "train", "test", image_column="img"),
    "cifar100": Preset("uoft-cs/cifar100", "train", "test", image_column="img", label_column="fine_label"),
    "stanford_cars": Preset("tanganke/stanford_cars", "train", "test"),
    "oxford_pets": Preset("timm/oxford-iiit-pet", "train", "test"),
}


def find_preset(name: str) -> Preset:
    """The preset of that name; HiveError names those that there are."""
    require_one_of("preset", name, PRESETS)
    return PRESETS[name]
