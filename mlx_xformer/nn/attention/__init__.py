"""Attention: the computation, and the layer around it."""

from .config import AttentionConfig
from .core import attention, attention_weights
from .layer import (
    Attention,
    CrossAttention,
    GroupedQueryAttention,
    MultiHeadAttention,
    MultiQueryAttention,
    attention_score_bytes,
    get_attention,
)

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
]
