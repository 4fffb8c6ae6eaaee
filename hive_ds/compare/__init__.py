"""HIVE beside its baselines at small scale: every arm from the same encoder and LLM, judged the same way."""
