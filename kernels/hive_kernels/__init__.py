"""Hierarchical attention: text queries over text keys and image keys in one softmax."""

from .backends import BACKENDS, Choice, choose_backend
from .checks import QK_NORMS
from .copies import to_device
from .finish import finish_keys
from .fused import KernelTables, prepare_layout, prepared_attention
from .layout import AttentionLayout
from .op import hierarchical_attention
from .warmup import warm_up

__all__ = [
    "BACKENDS",
    "QK_NORMS",
    "AttentionLayout",
    "Choice",
    "KernelTables",
    "choose_backend",
    "finish_keys",
    "hierarchical_attention",
    "prepare_layout",
    "prepared_attention",
    "to_device",
    "warm_up",
]
