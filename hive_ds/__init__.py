"""HIVE-DS: pre-train vision encoders with a language model's supervision, on clusters.

Source of the method: arXiv 2604.00086.
"""

__version__ = "0.1.0"
