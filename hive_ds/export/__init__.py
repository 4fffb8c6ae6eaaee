"""Export: trained models as folders that other libraries load, checked before they are called done.

Nothing here imports training.
"""

from hive_ds.export.encoder import ExportReport, export_encoder
from hive_ds.export.source import model_folder

__all__ = ["ExportReport", "export_encoder", "model_folder"]
