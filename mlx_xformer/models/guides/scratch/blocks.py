"""Blocks of the stack, their norm, and the stack. Axes: B batch, H heads, L positions, S positions of a memory,
E model_dim, M enc_out_dim, D key_dim."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ....backend import norms
from ....nn.attention.heads import reshape_to_heads
from ....nn.attention.layer import Attention
from ....nn.cache import CrossCache, KVCache
from ....nn.config import check_eps
from ....nn.layers import FeedForward, LayerNorm, apply_dropout
from ....nn.transformer import run_layers
from .config import RATES, StackConfig


class UnbiasedLayerNorm(nn.Module):
    """(x - mean) / (deviation + eps) * weight + bias over the last axis: the deviation is unbiased and eps outside the
    root (Jurafsky and Martin, Speech and Language Processing, 3rd ed.). nn.LayerNorm's weights do not fit it: it gives
    sqrt((d - 1) / d) times as much."""

    def __init__(self, dims: int, eps: float = 1e-6):
        super().__init__()
        if dims < 2:
            raise ValueError(f"dims must be at least 2 for an unbiased deviation, got {dims}")
        check_eps(eps)
        self.dims, self.eps = dims, eps
        self.weight = mx.ones((dims,))
        self.bias = mx.zeros((dims,))

    def __call__(self, x: mx.array) -> mx.array:
        """Normalises (..., dims)."""
        center, var = norms.mean_var(x, (x.ndim - 1,))
        spread = var > 0  # where there is none the root has no derivative, and x - center is 0
        deviation = mx.where(spread, mx.sqrt(mx.where(spread, var, 1) * (self.dims / (self.dims - 1))), 0)
        return ((x - center) / (deviation + self.eps) * self.weight + self.bias).astype(x.dtype)


class TransformerBlock(nn.Module):
    """x + attention to itself, with enc_out_dim + attention to a memory, + a feed-forward network, each of a norm of
    what there was: norm_1, norm_3 and norm_2, in this order."""

    def __init__(self, config: StackConfig):
        super().__init__()
        self.config = config
        E, H = config.model_dim, config.num_heads
        rate = 0.0 if config.score_dropout else config.attention_dropout
        shared: dict[str, Any] = {"head_dim": config.key_dim, "value_dim": E // H, "bias": False, "dropout": rate}
        norm = LayerNorm if config.norm == "layer" else UnbiasedLayerNorm
        self.self_attn = Attention(E, H, causal=config.causal, **shared)
        self.norm_1 = norm(E, config.norm_eps)
        if config.enc_out_dim is not None:
            self.cross_attn = Attention(E, H, kv_dim=config.enc_out_dim, **shared)
            self.norm_3 = norm(E, config.norm_eps)
        self.mlp = FeedForward(E, config.hidden_dim, "relu")
        self.norm_2 = norm(E, config.norm_eps)

    def __call__(
        self,
        x: mx.array,
        memory: mx.array | None = None,
        *,
        mask: mx.array | None = None,
        memory_mask: mx.array | None = None,
        bias: mx.array | None = None,
        cache: KVCache | None = None,
        cross_cache: CrossCache | None = None,
        key: mx.array | None = None,
    ) -> mx.array:
        """x (B, L, E), memory (B, S, M) -> (B, L, E). mask, memory_mask: which positions of x and of the memory may be
        attended to, True = attend, broadcast to (B, H, L, L) and (B, H, L, S). bias: added to the scores of
        self-attention. cache, cross_cache: of self-attention (with `causal` only) and of the memory. key: random, for
        dropout in training."""
        config = self.config
        if config.enc_out_dim is not None and memory is None:
            raise ValueError("memory must be given to a block with enc_out_dim, got none")
        if config.enc_out_dim is None and memory is not None:
            raise ValueError(f"memory must not be given to a block without enc_out_dim, got shape {memory.shape}")
        keys: Any = [None] * 6
        if self.training and any(getattr(config, name) for name in RATES):
            keys = mx.random.split(needed(key), 6)
        branch = config.block_dropout if config.dropout_at == "branches" else 0.0
        given: dict[str, Any] = {"mask": mask, "bias": bias, "cache": cache}
        y = self._attend(self.self_attn, self.norm_1(x), None, keys[0], given)
        x = x + apply_dropout(y, branch, keys[1])
        if memory is not None:
            given = {"mask": memory_mask, "cache": cross_cache}
            y = self._attend(self.cross_attn, self.norm_3(x), memory, keys[2], given)
            x = x + apply_dropout(y, branch, keys[3])
        x = x + apply_dropout(self.mlp(self.norm_2(x)), config.ffn_dropout, keys[4])
        return x if config.dropout_at == "branches" else apply_dropout(x, config.block_dropout, keys[5])

    def _attend(
        self, layer: Attention, x: mx.array, memory: mx.array | None, key: mx.array | None, given: dict[str, Any]
    ) -> mx.array:
        """The attention of x to itself or to a memory."""
        if key is None or not self.config.score_dropout:
            return layer(x, memory, key=key, **given)
        if given["cache"] is not None:
            raise ValueError("score_dropout must not be with a cache in training, got one")
        source = x if memory is None else memory
        projected = layer.q_proj(x), layer.k_proj(source)
        q, k = (reshape_to_heads(y, layer.config.num_heads) for y in projected)
        scores = (q * layer.scale) @ k.swapaxes(-1, -2)  # (B, H, L, S)
        change = apply_dropout(scores, self.config.attention_dropout, key) - scores
        bias = given.get("bias")
        return layer(x, memory, **{**given, "bias": change if bias is None else change + bias})


def needed(key: mx.array | None) -> mx.array:
    """The key, which dropout in training cannot do without."""
    if key is None:
        raise ValueError("dropout in training needs a random key, got none")
    return key


class TransformerStack(nn.Module):
    """num_stack blocks in a row."""

    def __init__(self, config: StackConfig):
        super().__init__()
        self.config = config
        self.blocks = [TransformerBlock(config) for _ in range(config.num_stack)]

    def __call__(
        self,
        x: mx.array,
        memory: mx.array | None = None,
        *,
        mask: mx.array | None = None,
        memory_mask: mx.array | None = None,
        bias: mx.array | None = None,
        caches: Sequence[KVCache] | None = None,
        cross_caches: Sequence[CrossCache] | None = None,
        key: mx.array | None = None,
    ) -> mx.array:
        """As TransformerBlock, with a cache of each kind for every block."""
        shared: dict[str, Any] = {"memory": memory, "mask": mask, "memory_mask": memory_mask, "bias": bias}
        return run_layers(self.blocks, x, caches=caches, cross_caches=cross_caches, key=key, **shared)
