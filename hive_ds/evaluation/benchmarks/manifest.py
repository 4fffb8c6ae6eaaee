"""What lmms-eval reads of this package's entry point: ``--model hive_ds`` is `CheckpointModel`.

It is read whenever lmms-eval is imported, so it imports nothing else.
"""

from __future__ import annotations

from lmms_eval.models.registry_v2 import ModelManifest

MANIFEST = ModelManifest(
    model_id="hive_ds", chat_class_path="hive_ds.evaluation.benchmarks.checkpoint_model.CheckpointModel"
)
