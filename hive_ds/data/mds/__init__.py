"""MDS shards: the one package that imports ``streaming`` (mosaicml-streaming).

Importing it needs the extra; everything else in `hive_ds.data` imports it inside functions, so that the rest works
without.
"""

from hive_ds.data.environment import find_world
from hive_ds.errors import HiveError

find_world()  # streaming needs LOCAL_WORLD_SIZE, which the deepspeed launcher does not set

try:
    import streaming  # noqa: F401
except ImportError as error:
    raise HiveError(
        f"MDS shards need mosaicml-streaming ({error}): pip install 'hive-ds[streaming]' (it pins transformers < 5)"
    ) from error

from hive_ds.data.mds.dataset import SampleDataset  # noqa: E402 (after the check above)
from hive_ds.data.mds.folder import read_mds, write_mds  # noqa: E402
from hive_ds.data.mds.loader import SampleLoader  # noqa: E402

__all__ = ["SampleDataset", "SampleLoader", "read_mds", "write_mds"]
