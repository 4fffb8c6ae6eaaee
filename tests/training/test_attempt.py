"""One attempt among several, on its own; `save_checks` has it on ranks, beside checkpoints."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from hive_ds.data.batch import BadSample
from hive_ds.errors import HiveError
from hive_ds.training.attempt import Agreement, Attempt
from hive_ds.training.bad_samples import check_bad_share
from hive_ds.training.distributed import World

OTHER = World(rank=1, local_rank=1, size=2, local_size=2)


def test_attempts_without_a_name_replace_one_another(tmp_path: Path) -> None:
    first, second = (Attempt(tmp_path, World(), {}) for _ in range(2))
    with pytest.raises(HiveError, match="attempt nobody took over from this one"):
        first.check()
    for attempt in (first, second):
        attempt.sign()
        attempt.check()
        assert attempt.word(writing=False) == [0.0, 0.0]
    with pytest.raises(HiveError, match=r"took over from this one, \w+; nothing was written$"):
        first.check()
    assert first.word(writing=False) == [2.0, 0.0]


def test_only_the_first_rank_signs_and_speaks(tmp_path: Path) -> None:
    other = Attempt(tmp_path / "new", OTHER, {"HIVE_STOP_AT": "0"})
    other.make_folder()
    other.sign()
    other.check()
    assert list(tmp_path.iterdir()) == []
    assert other.word(writing=True) == [0.0, 1.0]


def test_when_an_attempt_stops(tmp_path: Path) -> None:
    for given, word in (("0", 1.0), (str(time.time() + 600), 0.0), (None, 0.0)):
        attempt = Attempt(tmp_path, World(), {"HIVE_ATTEMPT": "a", **({"HIVE_STOP_AT": given} if given else {})})
        attempt.sign()
        assert attempt.word(writing=False) == [word, 0.0]
    (tmp_path / "STOP").touch()
    assert attempt.word(writing=False) == [1.0, 0.0]
    said = ([0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 2.0])
    assert [attempt.agree(word) for word in said] == [
        Agreement(stop=bool(stop), writing=bool(writing)) for stop, writing in said
    ]


def test_a_signature_that_cannot_be_read_for_a_moment_ends_no_training(tmp_path: Path) -> None:
    attempt = Attempt(tmp_path, World(), {"HIVE_ATTEMPT": "a"})
    (tmp_path / "attempt").mkdir()  # whoever reads it gets an error
    assert attempt.word(writing=False) == [0.0, 0.0]


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    attempt = Attempt(tmp_path / "file" / "stage1", World(), {})
    for act in (attempt.make_folder, attempt.sign):
        with pytest.raises(HiveError, match=r"/file/stage1: cannot be written \(.*\); expected a folder for this run$"):
            act()


@pytest.mark.parametrize(("samples", "share", "allowed"), [(200, 0.01, 19), (1000, 0.01, 19), (10_000, 0.01, 130)])
def test_as_many_bad_samples_as_chance_explains_pass(samples: int, share: float, allowed: int) -> None:
    """Three deviations above the expectation, which is taken of a thousand samples at least."""
    found = [BadSample("a", "first"), BadSample("b", "no picture")]
    check_bad_share(allowed, samples, share, found)
    with pytest.raises(
        HiveError, match=rf"^{allowed + 1} bad samples .* allow \({allowed}\); the last, b: no picture$"
    ):
        check_bad_share(allowed + 1, samples, share, found)
