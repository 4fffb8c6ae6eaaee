"""Data: sources -> samples -> MDS shards -> packed batches. Nothing here imports the model."""
