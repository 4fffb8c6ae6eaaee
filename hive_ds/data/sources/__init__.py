"""Where samples come from: one class a format, and `open_source`, which tells them apart."""

from hive_ds.data.sources.base import Columns, Source
from hive_ds.data.sources.opening import FORMATS, PRESETS, SourceOptions, open_source

__all__ = ["FORMATS", "PRESETS", "Columns", "Source", "SourceOptions", "open_source"]
