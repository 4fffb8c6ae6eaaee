"""Cold start: one cache a machine, everything compiled before step 1, nothing compiled for new lengths."""

from __future__ import annotations

import fcntl
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton: pip install triton")

from hive_ds.kernels import kernel_cache, warm_up


def test_cache_is_on_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    monkeypatch.setattr(kernel_cache.tempfile, "gettempdir", lambda: str(tmp_path))
    folder = kernel_cache.use_local_cache()
    assert folder.parent == tmp_path
    assert folder.stat().st_mode & 0o777 == 0o700
    assert os.environ["TRITON_CACHE_DIR"] == str(folder)


def test_cache_that_was_chosen_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "own"))
    assert kernel_cache.use_local_cache() == tmp_path / "own"
    assert (tmp_path / "own").is_dir()


def test_cache_of_someone_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    monkeypatch.setattr(kernel_cache.tempfile, "gettempdir", lambda: str(tmp_path))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / f"hive-triton-{os.getuid()}").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PermissionError, match="belongs to another user; expected a folder of one's own"):
        kernel_cache.use_local_cache()


def test_cache_that_another_user_made_first_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    monkeypatch.setattr(kernel_cache.tempfile, "gettempdir", lambda: str(tmp_path))
    other = os.getuid() + 1
    monkeypatch.setattr(os, "getuid", lambda: other)
    with pytest.raises(PermissionError, match=f"hive-triton-{other} belongs to another user"):
        kernel_cache.use_local_cache()


def test_importing_kernels_sets_the_cache(tmp_path: Path) -> None:
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_CACHE_DIR"} | {"TMPDIR": str(tmp_path)}
    code = "import triton, hive_ds.kernels.triton_launch; print(triton.knobs.cache.dir)"
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == str(tmp_path / f"hive-triton-{os.getuid()}")


def test_warm_up_reaches_every_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both forward kernels' forms, the one-pass and the two-pass backward kernels, and a decoding step."""
    from hive_ds.kernels import tiles, triton_launch
    from hive_ds.kernels.launching import Launcher

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    # Few rows, so that the interpreter is done in seconds.
    monkeypatch.setattr("hive_ds.kernels.warmup.SHORT_ROWS", 4)
    monkeypatch.setattr("hive_ds.kernels.arguments.SHORT_ROWS", 4)
    short = tiles.TABLE[tiles.architecture_of(torch.device(device()))]["backward short"]
    monkeypatch.setitem(short, 32, short[32]._replace(rows=4))
    launched = set()
    launchers = {name: x for name, x in vars(triton_launch).items() if isinstance(x, Launcher)}
    assert len(launchers) == 5
    for name, launcher in launchers.items():

        class Recorder:
            def __init__(self, name: str, kernel: object) -> None:
                self.name, self.kernel = name, kernel

            def __getitem__(self, grid: object) -> object:
                launched.add(self.name)
                return self.kernel[grid]  # type: ignore[index]

        monkeypatch.setattr(launcher, "kernel", Recorder(name, launcher.kernel))
        monkeypatch.setattr(launcher, "_compiled", {})
    options = {"heads": 2, "groups": 1, "head_dim": 32, "dtype": torch.float32, "device": device()}
    if not tiles.INTERPRETED:
        options["dtype"] = torch.bfloat16  # fp32 has no one-pass kernel on a GPU
    assert warm_up(**options, qk_norm="pre_rope", decoding=True) > 0  # type: ignore[arg-type]
    assert launched == launchers.keys()
    assert (tmp_path / "warm-up.lock").exists()


def test_warm_up_compiles_what_answers_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt on a cache has another tile than a token; padded batches of cascaded models hand over packed keys."""
    from hive_ds.kernels import AttentionLayout, hierarchical_attention, triton_launch

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("hive_ds.kernels.arguments.architecture_of", lambda device: "sm_90")  # has a tile for decoding
    started = set()
    monkeypatch.setattr(triton_launch, "forward_kernel", lambda *given: started.add(given[-1]))
    for other in ("finish_kernel", "key_gradient_kernel", "query_gradient_kernel", "short_gradient_kernel"):
        monkeypatch.setattr(triton_launch, other, lambda *given: None)
    options = {"heads": 6, "groups": 2, "head_dim": 32, "dtype": torch.bfloat16, "device": device()}
    warm_up(**options, rotate=False, decoding=True)  # type: ignore[arg-type]
    warm = set(started)

    def attend(cached: int, new: int, *, packed: bool) -> None:
        layout = AttentionLayout.build([cached + new] * 2, [[3], []], [[0], []], [new] * 2, device=device())
        shape = (2 * (cached + new),) if packed else (2, cached + new + 5)
        q, keys, image_keys = (
            torch.zeros(*rows, 32, dtype=torch.bfloat16, device=device())
            for rows in ((2 * new, 6), (*shape, 2), (3, 2))
        )
        hierarchical_attention(q, keys, keys, image_keys, image_keys, layout, backend="triton")

    attend(0, 40, packed=False)
    attend(0, 3, packed=False)
    attend(40, 1, packed=False)
    attend(40, 1, packed=True)
    assert started == warm


def test_one_process_at_a_time_compiles_every_size_of_tile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one-pass backward kernel takes as many rows as a text has: 64, 128 or 256, and beyond those is long text."""
    import triton

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    tiles = []

    def try_lock() -> None:
        with (tmp_path / "warm-up.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)

    def attend(tokens: int, *_: object) -> None:
        tiles.append(max(64, triton.next_power_of_2(3 * tokens)))
        with pytest.raises(BlockingIOError):
            try_lock()

    monkeypatch.setattr("hive_ds.kernels.warmup._attend", attend)
    warm_up(heads=6, groups=2, head_dim=64, dtype=torch.float32, device="cpu")
    assert tiles == [64, 128, 256, 512]
    try_lock()


def device() -> str:
    from hive_ds.kernels import tiles

    return "cpu" if tiles.INTERPRETED else "cuda"


@pytest.mark.parametrize(
    ("capability", "row"),
    [((8, 0), "sm_80"), ((8, 9), "sm_80"), ((9, 0), "sm_90"), ((10, 0), "sm_90"), ((12, 0), "sm_80")],
)
def test_tiles_fit_the_shared_memory_of_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], row: str
) -> None:
    from hive_ds.kernels import tiles

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    for hip, expected in ((None, row), ("7.0", "gfx942")):
        monkeypatch.setattr(torch.version, "hip", hip)
        assert tiles.architecture_of.__wrapped__(torch.device("cuda", 0)) == expected


def test_every_kernel_has_a_tile_that_triton_can_make() -> None:
    """Of powers of two, 16 or more; no rows where a kernel is not made. In fp32 a GPU's tiles are small."""
    from hive_ds.kernels.tiles import KINDS, TABLE, choose_tile

    sizes = {16, 32, 64, 128, 256}
    for architecture, kind, head_dim in itertools.product(TABLE, KINDS, (2, 32, 33, 64, 80, 128, 130, 256)):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            tile = choose_tile(architecture, head_dim, kind, dtype)
            assert tile.keys in sizes, (architecture, kind, head_dim)
            assert tile.rows in (sizes | {0} if kind == "backward short" else sizes), (architecture, kind, head_dim)
            if dtype == torch.float32 and architecture != "interpreter":
                assert max(tile.rows, tile.keys) <= 32
