"""The cross-transformer of MetalAudio's guide, step by step. Axes: B batch, L tokens of a branch, E embed_dim."""

from typing import Any

import numpy as np

from ... import backend
from ...nn.attention import attention_layer
from ...nn.layers import Params, feed_forward, layer_norm, sub


def transformer_layer(params: Params, config: Any, time: np.ndarray, freq: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Self-attention, attention to the other branch, feed-forward: time (B, L, E), freq (B, L', E) -> the same."""

    def norm(name: str, x: np.ndarray) -> np.ndarray:
        return layer_norm(sub(params, name), x)

    def attend(name: str, x: np.ndarray, source: np.ndarray) -> np.ndarray:
        return attention_layer(sub(params, name), x, source, num_heads=config.num_heads)

    def feed(name: str, x: np.ndarray) -> np.ndarray:
        return feed_forward(sub(params, name), x, activation=getattr(backend, config.activation))

    y, z = norm("norm_time_self", time), norm("norm_freq_self", freq)
    time, freq = time + attend("self_attn_time", y, y), freq + attend("self_attn_freq", z, z)
    y, z = norm("norm_time_cross", time), norm("norm_freq_cross", freq)  # both attentions read this pair
    time, freq = time + attend("cross_attn_time", y, z), freq + attend("cross_attn_freq", z, y)
    y, z = norm("norm_time_ffn", time), norm("norm_freq_ffn", freq)
    return time + feed("ffn_time", y), freq + feed("ffn_freq", z)


def cross_transformer_encoder(
    params: Params, config: Any, time: np.ndarray, freq: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The layers in a row: time (B, L, E), freq (B, L', E) -> the same shapes."""
    for index in range(config.num_layers):
        time, freq = transformer_layer(sub(params, f"layers.{index}"), config, time, freq)
    return time, freq
