"""The cross-transformer as MetalAudio's guide documents it: two branches that attend to themselves and to each other in
every layer. HTDemucs' own, whose layers take turns, is in models/htdemucs.

Source: zkeown/MetalAudio, docs/guides/TRANSFORMER_LAYERS.md. Neither positions nor a norm at the end are part of it.
Axes: B batch, L tokens of a branch, E embed_dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import mlx.core as mx
import mlx.nn as nn

from ...backend.activations import ACTIVATIONS
from ...nn.attention.layer import Attention
from ...nn.config import Config
from ...nn.layers import FeedForward, LayerNorm


@dataclass(frozen=True)
class CrossTransformerConfig(Config):
    """The fields of a CrossTransformerEncoder, checked.

    Attributes:
        embed_dim: Channels of a token.
        num_heads: Heads of each attention.
        num_layers: Layers.
        hidden_dim: Channels inside the feed-forward networks; by default 4 * embed_dim.
        activation: Of the networks: "gelu_tanh", "gelu" or "relu".
        attention_bias: Whether all projections of attentions have biases, or none.
        ffn_bias: Whether all networks have biases, or none.

    Raises:
        ValueError: A field is unknown, of the wrong type or out of range; the message names it.
    """

    _what: ClassVar[str] = "the cross-transformer"

    embed_dim: int
    num_heads: int
    num_layers: int
    hidden_dim: int | None = None
    activation: str = "gelu_tanh"
    attention_bias: bool = True
    ffn_bias: bool = True

    def __post_init__(self) -> None:
        if self.hidden_dim is None and type(self.embed_dim) is int:
            object.__setattr__(self, "hidden_dim", 4 * self.embed_dim)
        self._check_whole("embed_dim", "num_heads", "num_layers", "hidden_dim")
        self._check_flags("attention_bias", "ffn_bias")
        self._check_multiple("embed_dim", "num_heads")
        self._check_one_of("activation", ACTIVATIONS)


class TransformerLayer(nn.Module):
    """Each branch attends to itself, then to the other, then goes through its feed-forward network: every step on a
    layer norm of its own and added to what came in."""

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        hidden_dim: int,
        *,
        activation: str = "gelu_tanh",
        attention_bias: bool = True,
        ffn_bias: bool = True,
    ):
        super().__init__()
        self.embed_dim = embed_dim
        self.norm_time_self, self.norm_freq_self = LayerNorm(embed_dim), LayerNorm(embed_dim)
        self.norm_time_cross, self.norm_freq_cross = LayerNorm(embed_dim), LayerNorm(embed_dim)
        self.norm_time_ffn, self.norm_freq_ffn = LayerNorm(embed_dim), LayerNorm(embed_dim)
        attend = partial(Attention, embed_dim, num_heads, bias=attention_bias)
        self.self_attn_time, self.self_attn_freq = attend(), attend()
        self.cross_attn_time, self.cross_attn_freq = attend(), attend()  # of time to freq, of freq to time
        feed = partial(FeedForward, embed_dim, hidden_dim, activation, bias=ffn_bias)
        self.ffn_time, self.ffn_freq = feed(), feed()

    def __call__(self, time: mx.array, freq: mx.array) -> tuple[mx.array, mx.array]:
        """time (B, L, E) and freq (B, L', E), or both without B -> the same shapes."""
        _check(time, freq, self.embed_dim)
        time = time + self.self_attn_time(self.norm_time_self(time))
        freq = freq + self.self_attn_freq(self.norm_freq_self(freq))
        # Both sides read the other's value from before this step.
        normed_time, normed_freq = self.norm_time_cross(time), self.norm_freq_cross(freq)
        time = time + self.cross_attn_time(normed_time, normed_freq)
        freq = freq + self.cross_attn_freq(normed_freq, normed_time)
        time = time + self.ffn_time(self.norm_time_ffn(time))
        freq = freq + self.ffn_freq(self.norm_freq_ffn(freq))
        return time, freq


class CrossTransformerEncoder(nn.Module):
    """Transformer layers in a row. Instances share nothing: threads that each have their own do not disturb one
    another."""

    def __init__(self, config: CrossTransformerConfig):
        super().__init__()
        self.config = config
        assert config.hidden_dim is not None  # for the type checker: the configuration has set it
        self.layers = [
            TransformerLayer(
                config.embed_dim,
                config.num_heads,
                config.hidden_dim,
                activation=config.activation,
                attention_bias=config.attention_bias,
                ffn_bias=config.ffn_bias,
            )
            for _ in range(config.num_layers)
        ]

    def __call__(self, time: mx.array, freq: mx.array) -> tuple[mx.array, mx.array]:
        """time (B, L, E) and freq (B, L', E), or both without B -> the same shapes."""
        for layer in self.layers:
            time, freq = layer(time, freq)
        return time, freq


def _check(time: mx.array, freq: mx.array, embed_dim: int) -> None:
    for name, x in (("time", time), ("freq", freq)):
        if x.ndim not in (2, 3) or x.shape[-1] != embed_dim:
            raise ValueError(f"{name} must be (B, L, {embed_dim}) or (L, {embed_dim}), got shape {x.shape}")
    if time.shape[:-2] != freq.shape[:-2]:
        raise ValueError(f"freq must have the batch axis of time, {time.shape[:-2]}, got {freq.shape[:-2]}")
