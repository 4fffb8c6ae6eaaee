"""Export: trained models as folders that other libraries load, checked before they are called done.

Nothing here imports training.
"""

from hive_ds.export.encoder import ExportReport, export_encoder
from hive_ds.export.source import model_folder
from hive_ds.export.vlm import VlmReport, export_vlm

__all__ = ["ExportReport", "VlmReport", "export_encoder", "export_vlm", "model_folder"]
