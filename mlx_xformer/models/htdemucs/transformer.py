"""The cross-transformer of HTDemucs: spectrogram and waveform tokens attend to themselves and to each other in turn.

Source: demucs/transformer.py. Tokens are (B, L, E); a spectrogram's are ordered frames first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import SupportsIndex

import mlx.core as mx
import mlx.nn as nn

from ...nn.attention.layer import Attention
from ...nn.layers import FeedForward, GroupNorm, LayerNorm, LayerScale
from ...nn.positions import sinusoidal_1d, sinusoidal_2d
from .config import HTDemucsConfig

_SCALED_BOOST = 3.0  # the learned table is stored divided by this


def _norm(dims: int, groups: int) -> nn.Module:
    """LayerNorm per token or, with groups, GroupNorm over all tokens."""
    return GroupNorm(int(groups), dims) if groups else LayerNorm(dims)


class CrossTransformerLayer(nn.Module):
    """A transformer block whose attention reads its own tokens, or (cross) those of the other branch.

    Pre-norm cross layers have norm1 for the queries, norm2 for the keys and values and norm3 before the feed-forward
    network; self layers use norm2 there. Post-norm layers use norm1 and norm2 after the two residual sums.
    """

    def __init__(self, config: HTDemucsConfig, *, cross: bool):
        super().__init__()
        dims = config.transformer_channels
        self.cross, self.norm_first = cross, config.t_norm_first
        attention = Attention(dims, config.t_heads)
        if cross:
            self.cross_attn = attention
            self.norm3 = _norm(dims, config.t_group_norm)
        else:
            self.self_attn = attention
        self.ffn = FeedForward(dims, int(dims * config.t_hidden_scale), "gelu" if config.t_gelu else "relu")
        self.norm1 = _norm(dims, config.t_group_norm)
        self.norm2 = _norm(dims, config.t_group_norm)
        self.normed_out = config.t_norm_first and config.t_norm_out
        if self.normed_out:
            self.norm_out = GroupNorm(1, dims)
        self.scaled = config.t_layer_scale
        if self.scaled:
            self.gamma_1 = LayerScale(dims)
            self.gamma_2 = LayerScale(dims)

    def __call__(self, x: mx.array, other: mx.array | None = None) -> mx.array:
        """x (B, L, E) and, in a cross layer, the other branch's tokens (B, S, E) -> (B, L, E)."""
        if not self.norm_first:
            x = self.norm1(x + self._scale_1(self._attend(x, other)))
            return self.norm2(x + self._scale_2(self.ffn(x)))
        source = self.norm2(other) if self.cross else None
        x = x + self._scale_1(self._attend(self.norm1(x), source))
        norm_ffn = self.norm3 if self.cross else self.norm2
        x = x + self._scale_2(self.ffn(norm_ffn(x)))
        return self.norm_out(x) if self.normed_out else x

    def _attend(self, x: mx.array, source: mx.array | None) -> mx.array:
        return self.cross_attn(x, source) if self.cross else self.self_attn(x)

    def _scale_1(self, x: mx.array) -> mx.array:
        return self.gamma_1(x) if self.scaled else x

    def _scale_2(self, x: mx.array) -> mx.array:
        return self.gamma_2(x) if self.scaled else x


class CrossTransformer(nn.Module):
    """Position embeddings, then self and cross layers in turn, for (B, T, F, E) and (B, T2, E) at once."""

    def __init__(self, config: HTDemucsConfig):
        super().__init__()
        dims = config.transformer_channels
        self.emb, self.max_period = config.t_emb, config.t_max_period
        self.centered, self.weight_pos_embed = config.t_cape_mean_normalize, config.t_weight_pos_embed
        self.normed_in = bool(config.t_norm_in or config.t_norm_in_group)
        if self.normed_in:
            groups = 0 if config.t_norm_in else config.t_norm_in_group
            self.norm_in = _norm(dims, groups)
            self.norm_in_t = _norm(dims, groups)
        if self.emb == "scaled":
            self.position_embeddings = nn.Embedding(config.t_max_positions, dims)
        crossing = [(index % 2 == 1) != config.t_cross_first for index in range(config.t_layers)]
        self.layers = [CrossTransformerLayer(config, cross=cross) for cross in crossing]
        self.layers_t = [CrossTransformerLayer(config, cross=cross) for cross in crossing]

    def __call__(
        self, x: mx.array, xt: mx.array, position_shift: SupportsIndex | Sequence[int] = 0
    ) -> tuple[mx.array, mx.array]:
        """x (B, T, F, E) and xt (B, T2, E) -> the same shapes.

        `position_shift` moves the waveform's positions (t_sin_random_shift), one value or one per batch row.
        """
        B, T, F, E = x.shape
        positions = mx.flatten(sinusoidal_2d(F, T, E, max_period=self.max_period), 0, 1)
        x = mx.flatten(x, 1, 2)  # (B, T * F, E)
        if self.normed_in:
            x, xt = self.norm_in(x), self.norm_in_t(xt)
        x = x + self.weight_pos_embed * positions
        xt = xt + self.weight_pos_embed * self._positions_t(xt.shape[1], E, position_shift)
        for layer, layer_t in zip(self.layers, self.layers_t, strict=True):
            if layer.cross:  # both sides read the other's value from before this layer
                x, xt = layer(x, xt), layer_t(xt, x)
            else:
                x, xt = layer(x), layer_t(xt)
        return mx.unflatten(x, 1, (T, F)), xt

    def _positions_t(self, length: int, dims: int, shift: SupportsIndex | Sequence[int]) -> mx.array:
        """(length, E), or (B, length, E) with a shift per batch row."""
        if self.emb == "scaled":
            if length > self.position_embeddings.weight.shape[0]:
                known = self.position_embeddings.weight.shape[0]
                raise ValueError(f"mix must need at most t_max_positions = {known} tokens, got {length}")
            return self.position_embeddings.weight[:length] * _SCALED_BOOST
        if self.emb == "cape":
            return sinusoidal_1d(length, dims, max_period=self.max_period, centered=self.centered)
        if isinstance(shift, SupportsIndex):
            return sinusoidal_1d(length, dims, shift=int(shift), max_period=self.max_period)
        return mx.stack([sinusoidal_1d(length, dims, shift=s, max_period=self.max_period) for s in shift])
