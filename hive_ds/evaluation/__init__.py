"""Judging what was trained: generated answers, benchmarks, and probes of the frozen encoder."""
