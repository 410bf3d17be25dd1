"""The cross-domain transformer of HTDemucs.

Axes: B batch, L tokens, C channels; T frames, F frequencies. Source: demucs/transformer.py.
"""

from typing import Any

import numpy as np

from ...backend import gelu, relu
from ...nn.attention import attention_layer
from ...nn.layers import Params, feed_forward, group_norm, layer_norm, layer_scale, sub
from ...nn.positions import sinusoidal_1d, sinusoidal_2d

_EMBEDDING_BOOST = 3.0  # the learned table is stored divided by this


def cross_transformer_layer(params: Params, config: Any, x: np.ndarray, source: np.ndarray | None = None) -> np.ndarray:
    """Attention and a feed-forward network, each with a residual: x (B, L, C), source (B, S, C) -> (B, L, C).

    Without `source` x attends to itself.
    """

    def norm(name: str, y: np.ndarray) -> np.ndarray:
        if config.t_group_norm:
            return group_norm(sub(params, name), y, num_groups=int(config.t_group_norm))
        return layer_norm(sub(params, name), y)

    def attend(q: np.ndarray, k: np.ndarray | None) -> np.ndarray:
        name = "self_attn" if source is None else "cross_attn"
        return scaled("gamma_1", attention_layer(sub(params, name), q, k, num_heads=config.t_heads))

    def feed(y: np.ndarray) -> np.ndarray:
        activation = gelu if config.t_gelu else relu
        return scaled("gamma_2", feed_forward(sub(params, "ffn"), y, activation=activation))

    def scaled(name: str, y: np.ndarray) -> np.ndarray:
        return layer_scale(sub(params, name), y) if config.t_layer_scale else y

    if not config.t_norm_first:
        x = norm("norm1", x + attend(x, source))
        return norm("norm2", x + feed(x))
    if source is None:
        x = x + attend(norm("norm1", x), None)
        x = x + feed(norm("norm2", x))
    else:
        x = x + attend(norm("norm1", x), norm("norm2", source))
        x = x + feed(norm("norm3", x))
    if config.t_norm_first & config.t_norm_out:  # bitwise as in the source: 2 groups would turn it off
        x = group_norm(sub(params, "norm_out"), x, num_groups=int(config.t_norm_out))
    return x


def _positions(params: Params, config: Any, length: int, dim: int, shift: int) -> np.ndarray:
    """The waveform branch's positions, (length, dim)."""
    if config.t_emb == "sin":
        return sinusoidal_1d(length, dim, shift=shift, max_period=config.t_max_period)
    if config.t_emb == "cape":
        centered = config.t_cape_mean_normalize
        return sinusoidal_1d(length, dim, max_period=config.t_max_period, centered=centered)
    if config.t_emb != "scaled":
        raise ValueError(f"t_emb must be 'sin', 'cape' or 'scaled', got {config.t_emb!r}")
    table = params["position_embeddings.weight"]
    if length > len(table):
        raise ValueError(f"waveform tokens must be at most t_max_positions = {len(table)}, got {length}")
    return table[:length] * _EMBEDDING_BOOST


def _norm_in(params: Params, config: Any, name: str, x: np.ndarray) -> np.ndarray:
    if config.t_norm_in:
        return layer_norm(sub(params, name), x)
    if config.t_norm_in_group:
        return group_norm(sub(params, name), x, num_groups=int(config.t_norm_in_group))
    return x


def cross_transformer(
    params: Params, config: Any, x: np.ndarray, xt: np.ndarray, *, position_shift: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Self-attention in each branch and attention to the other, in turn: x (B, T, F, C), xt (B, L, C)."""
    B, T, F, C = x.shape
    table = sinusoidal_2d(F, T, C, max_period=config.t_max_period)  # (T, F, C)
    table_t = _positions(params, config, xt.shape[1], C, position_shift)  # (L, C)

    x = _norm_in(params, config, "norm_in", x.reshape(B, T * F, C))
    x = x + config.t_weight_pos_embed * table.reshape(T * F, C).astype(x.dtype)
    xt = _norm_in(params, config, "norm_in_t", xt)
    xt = xt + config.t_weight_pos_embed * table_t.astype(xt.dtype)

    for index in range(config.t_layers):
        layer, layer_t = sub(params, f"layers.{index}"), sub(params, f"layers_t.{index}")
        crosses = index % 2 == (0 if config.t_cross_first else 1)
        if crosses:  # both branches see the other as it was before this layer
            x, xt = (
                cross_transformer_layer(layer, config, x, xt),
                cross_transformer_layer(layer_t, config, xt, x),
            )
        else:
            x, xt = cross_transformer_layer(layer, config, x), cross_transformer_layer(layer_t, config, xt)
    return x.reshape(B, T, F, C), xt
