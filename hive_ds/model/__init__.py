"""The HIVE model: vision encoder, projectors and an LLM whose routed layers cross-attend to vision features."""
