"""What is probed: images in a fixed order with labels, and the split into training and test images.

One set of images may carry several kinds of label (*tasks*): the features are computed once for all of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from hive_ds.errors import HiveError

TASK = "label"
"""Name of the task of an ordinary classification data set."""
NO_LABEL = -1


@dataclass(frozen=True)
class LabelledImages:
    """Images by number, and their labels.

    Attributes:
        name: for messages, as "food101 train".
        fingerprint: changes when the images or their order do; labels do not count.
        size: number of images.
        read: number -> the encoded file; called in worker processes.
        describe: number -> what a message calls the image.
        labels: task -> (size,) class names; None where the task does not apply to an image.
    """

    name: str
    fingerprint: str
    size: int
    read: Callable[[int], bytes]
    describe: Callable[[int], str]
    labels: Mapping[str, Sequence[str | None]]

    @classmethod
    def from_files(
        cls, name: str, files: Sequence[bytes], labels: Mapping[str, Sequence[str | None]]
    ) -> LabelledImages:
        """Images in memory, as encoded files."""
        digest = hashlib.sha256()
        for file in files:
            digest.update(hashlib.sha256(file).digest())
        return cls(
            name, digest.hexdigest(), len(files), files.__getitem__, partial("{}: image {}".format, name), labels
        )


@dataclass(frozen=True)
class Split:
    """Rows of the training and the test images that one run of a head uses, with their classes by number."""

    train_rows: np.ndarray
    train_labels: np.ndarray
    test_rows: np.ndarray
    test_labels: np.ndarray


@dataclass(frozen=True)
class Task:
    """One kind of label: its classes in order, and the class of every image, `NO_LABEL` where it does not apply."""

    name: str
    classes: tuple[str, ...]
    train: np.ndarray
    test: np.ndarray | None


@dataclass(frozen=True)
class ProbeData:
    """Training and test images. Without ``test``, every seed holds out ``test_share`` of each class of ``train``."""

    name: str
    train: LabelledImages
    test: LabelledImages | None
    test_share: float = 0.2

    def __post_init__(self) -> None:
        if not 0 < self.test_share < 1:
            raise HiveError(f"test share {self.test_share}: expected above 0 and below 1")
        for images in filter(None, (self.train, self.test)):
            if not images.size:
                raise HiveError(f"{images.name}: holds no image")
            for task, labels in images.labels.items():
                if len(labels) != images.size:
                    raise HiveError(f"{images.name}: {len(labels)} labels of {task!r} for {images.size} images")

    def tasks(self) -> list[Task]:
        """Every task, checked.

        HiveError names a task without labels or with one class, and a class that only one of the splits has.
        """
        return [self._task(name) for name in self.train.labels]

    def split(self, task: Task, seed: int) -> Split:
        """The rows with a label; where there are no test images, by ``seed`` from the training images.

        HiveError where a class is too small to be in both.
        """
        if task.test is not None:
            train_rows, test_rows = (np.flatnonzero(labels != NO_LABEL) for labels in (task.train, task.test))
            return Split(train_rows, task.train[train_rows], test_rows, task.test[test_rows])
        rows = np.flatnonzero(task.train != NO_LABEL)
        train, test = hold_out(task.train[rows], self.test_share, seed)
        for number, count in enumerate(np.bincount(task.train[rows][test], minlength=len(task.classes))):
            if not count:
                raise HiveError(
                    f"{self.train.name}: class {task.classes[number]!r} of {task.name!r} has one image, expected 2 or "
                    "more, for training and test"
                )
        return Split(rows[train], task.train[rows[train]], rows[test], task.train[rows[test]])

    def _task(self, name: str) -> Task:
        classes = _classes(self.train, name)
        if len(classes) < 2:
            raise HiveError(f"{self.train.name}: {name!r} has one class, {classes[0]!r}; expected at least 2")
        train = _numbers(self.train, name, classes)
        if self.test is None:
            return Task(name, classes, train, None)
        if name not in self.test.labels:
            raise HiveError(f"{self.test.name}: has no labels of {name!r}")
        for absent_from, absent in (
            (self.test, set(classes) - set(_classes(self.test, name))),
            (self.train, set(_classes(self.test, name)) - set(classes)),
        ):
            if absent:
                raise HiveError(
                    f"{absent_from.name}: has no image of class {min(absent)!r} of {name!r}, nor of {len(absent) - 1} "
                    "others; expected every class in the training and the test images"
                )
        return Task(name, classes, train, _numbers(self.test, name, classes))


def hold_out(labels: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions (kept, held out), ascending: ``share`` of each class, at least one unless it has only one."""
    generator = np.random.default_rng(seed)
    held = []
    for number in np.unique(labels):
        positions = generator.permutation(np.flatnonzero(labels == number))
        wanted = max(1, round(share * len(positions)))
        held.append(positions[: min(wanted, len(positions) - 1)])
    out = np.zeros(len(labels), dtype=bool)
    out[np.concatenate(held)] = True
    return np.flatnonzero(~out), np.flatnonzero(out)


def _classes(images: LabelledImages, task: str) -> tuple[str, ...]:
    classes = tuple(sorted({label for label in images.labels[task] if label is not None}))
    if not classes:
        raise HiveError(f"{images.name}: no image has a label of {task!r}")
    return classes


def _numbers(images: LabelledImages, task: str, classes: Sequence[str]) -> np.ndarray:
    number = {label: index for index, label in enumerate(classes)}
    return np.array([NO_LABEL if label is None else number[label] for label in images.labels[task]], dtype=np.int64)
