"""Attention: the computation, and the layer around it."""

from .config import AttentionConfig
from .core import attention, attention_weights
from .heads import repeat_kv, reshape_to_heads, transpose_heads_to_2d
from .kinds import (
    CrossAttention,
    GroupedQueryAttention,
    MultiHeadAttention,
    MultiQueryAttention,
    attention_score_bytes,
    get_attention,
    initialize,
)
from .layer import Attention

__all__ = [
    "Attention",
    "AttentionConfig",
    "CrossAttention",
    "GroupedQueryAttention",
    "MultiHeadAttention",
    "MultiQueryAttention",
    "attention",
    "attention_score_bytes",
    "attention_weights",
    "get_attention",
    "initialize",
    "repeat_kv",
    "reshape_to_heads",
    "transpose_heads_to_2d",
]
