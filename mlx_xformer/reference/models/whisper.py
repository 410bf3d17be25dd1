"""Whisper, step by step. Axes: B batch, T frames, F mel bins, S positions of the memory, L tokens, E embed_dim."""

from types import SimpleNamespace
from typing import Any

import numpy as np

from ..backend import gelu
from ..nn import transformer
from ..nn.layers import Params, conv1d, layer_norm, sub
from ..nn.positions import sinusoidal_1d


def source_positions(length: int, dim: int) -> np.ndarray:
    """The table of an encoder that has not been loaded: all sines, then all cosines, (length, dim) float64."""
    table = sinusoidal_1d(length, dim)
    return np.concatenate([table[:, dim // 2 :], table[:, : dim // 2]], axis=1)


def layer(params: Params, config: Any, x: np.ndarray, memory: np.ndarray | None = None) -> np.ndarray:
    """A layer of the encoder (B, L, E) or, with a memory (B, S, E), of the decoder: each step on a norm of its own."""
    shared = {"num_heads": config.num_heads, "num_kv_heads": None, "scale": None, "window": None, "moe": None}
    kind = {"norm": "layer", "norm_eps": 1e-5, "norm_first": True, "activation": "gelu", "gated": False}
    causal = {"causal": memory is not None, "cross": memory is not None}
    return transformer.layer(params, SimpleNamespace(**shared, **kind, **causal), x, memory)


def _layers(params: Params, config: Any, count: int, x: np.ndarray, *memory: np.ndarray) -> np.ndarray:
    """So many in a row, and a norm."""
    for index in range(count):
        x = layer(sub(params, f"stack.layers.{index}"), config, x, *memory)
    return layer_norm(sub(params, "stack.norm"), x)


def convolved(params: Params, mel: np.ndarray) -> np.ndarray:
    """mel (B, T, F) -> (B, S, E) with half as many positions."""
    x = gelu(conv1d(sub(params, "conv1"), mel, padding=1))
    return gelu(conv1d(sub(params, "conv2"), x, stride=2, padding=1))


def encoder(params: Params, config: Any, mel: np.ndarray) -> np.ndarray:
    """mel (B, T, F) -> the memory (B, S, E)."""
    x = convolved(params, mel)
    x = x + params["embed_positions.weight"][: x.shape[1]]
    return _layers(params, config, config.encoder_layers, x)


def embed(params: Params, tokens: np.ndarray) -> np.ndarray:
    """tokens (B, L) -> (B, L, E)."""
    return params["embed_tokens.weight"][tokens] + params["embed_positions.weight"][: tokens.shape[1]]


def from_embedded(params: Params, config: Any, x: np.ndarray, memory: np.ndarray) -> np.ndarray:
    """x (B, L, E), memory (B, S, E) -> logits (B, L, V)."""
    return logits(params, _layers(params, config, config.decoder_layers, x, memory))


def logits(params: Params, x: np.ndarray) -> np.ndarray:
    """x (B, L, E) -> (B, L, V), by the table of the embeddings."""
    return x @ params["embed_tokens.weight"].T


def decoder(params: Params, config: Any, tokens: np.ndarray, memory: np.ndarray) -> np.ndarray:
    """tokens (B, L), memory (B, S, E) -> logits (B, L, V)."""
    return from_embedded(params, config, embed(params, tokens), memory)


def whisper(params: Params, config: Any, mel: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """mel (B, T, F), tokens (B, L) -> logits (B, L, V)."""
    return decoder(sub(params, "decoder"), config, tokens, encoder(sub(params, "encoder"), config, mel))
