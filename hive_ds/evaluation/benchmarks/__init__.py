"""Benchmarks through lmms-eval: offline tasks, the model plugin, scores and self-tests."""
