"""A million samples: the index opens and resumes in seconds, and memory grows by the order of an epoch alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hive_ds.data.mds import write_mds
from hive_ds.data.mds.sizes import SIZES
from hive_ds.data.schema import Sample, Turn

SHARD, SHARDS = 4096, 245  # 1,003,520 samples

MAIN = """
import json, sys, time
from test_loader_shared_memory import make_dataset

def memory(name="VmRSS"):
    return int(open("/proc/self/status").read().split(name + ":")[1].split()[0]) / 1024

def peak():
    return memory("VmHWM")  # ru_maxrss begins with that of the process that started this one

warm = make_dataset(sys.argv[1])
next(iter(warm))
base, start = memory(), time.perf_counter()
data = make_dataset(sys.argv[2], balance=sys.argv[3] == "balance")
opened = time.perf_counter() - start
start = time.perf_counter()
data.seek(1, data.epoch_size // 2)
samples = iter(data)
next(samples)
resumed = time.perf_counter() - start
after_order, top = memory(), peak()
for _ in range(2000):
    next(samples)
print(json.dumps({"samples": data.num_samples, "opened": opened, "resumed": resumed, "base": base,
                  "order": after_order - base, "peak": top - base, "end": memory() - base}))
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder of one shard, and one that lists it many times under hard-linked names."""
    root = tmp_path_factory.mktemp("size")
    small, large = root / "small", root / "large"
    turns = (Turn("user", "Why?"), Turn("assistant", "So."))
    write_mds([Sample(f"s{index}", turns) for index in range(SHARD)], small)
    large.mkdir()
    index = json.loads((small / "index.json").read_bytes())
    [shard] = index["shards"]
    index["shards"] = []
    for number in range(SHARDS):
        name = f"shard.{number:05}.mds"
        os.link(small / "shard.00000.mds", large / name)
        index["shards"].append({**shard, "raw_data": {**shard["raw_data"], "basename": name}})
    (large / "index.json").write_text(json.dumps(index))
    np.save(large / SIZES, np.tile(np.load(small / SIZES), (SHARDS, 1)))
    return small, large


@pytest.mark.long
@pytest.mark.parametrize("balance", ["plain", "balance"])
def test_a_million_samples_open_and_resume_in_seconds(folders: tuple[Path, Path], balance: str) -> None:
    here = Path(__file__)
    environ = {**os.environ, "PYTHONPATH": f"{here.parent}:{here.parents[2]}"}
    command = [sys.executable, "-c", MAIN, *map(str, folders), balance]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    print(found)  # shown by pytest -s
    assert found["samples"] == SHARD * SHARDS
    assert found["opened"] < 5
    assert found["resumed"] < 10
    order = 8 * SHARD * SHARDS / 2**20
    # streaming holds some copies of the order while it makes one, and keeps a worker's own.
    assert found["peak"] < 15 * order
    assert found["end"] < 6 * order
