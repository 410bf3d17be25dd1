"""The stack of pre-norm blocks, and the encoder-decoder made of it. `config` has the fields of
models.guides.scratch.StackConfig.

Axes: B batch, L positions, S positions of a memory, E model_dim, V vocab_size.
"""

from typing import Any

import numpy as np

from ...backend import relu
from ...nn.attention import attention_layer
from ...nn.layers import Params, feed_forward, layer_norm, linear, sub
from ...nn.positions import sinusoidal


def unbiased_layer_norm(params: Params, x: np.ndarray, eps: float = 1e-6) -> np.ndarray:
    """(x - mean) / (unbiased deviation + eps) * weight + bias over the last axis."""
    centered = x - x.mean(axis=-1, keepdims=True)
    deviation = np.sqrt((centered * centered).sum(axis=-1, keepdims=True) / (x.shape[-1] - 1))
    return (centered / (deviation + np.asarray(eps, x.dtype)) * params["weight"] + params["bias"]).astype(x.dtype)


def block(
    params: Params,
    config: Any,
    x: np.ndarray,
    memory: np.ndarray | None = None,
    *,
    mask: np.ndarray | None = None,
    memory_mask: np.ndarray | None = None,
    bias: np.ndarray | None = None,
) -> np.ndarray:
    """x (B, L, E) -> the same: attention to itself, to the memory if there is one, and a network, each on a norm."""
    form = layer_norm if config.norm == "layer" else unbiased_layer_norm

    def norm(name: str) -> np.ndarray:
        return form(sub(params, name), x, config.norm_eps)

    H = config.num_heads
    own = {"num_heads": H, "causal": config.causal, "mask": mask, "bias": bias}
    x = x + attention_layer(sub(params, "self_attn"), norm("norm_1"), **own)
    if memory is not None:
        x = x + attention_layer(sub(params, "cross_attn"), norm("norm_3"), memory, num_heads=H, mask=memory_mask)
    return x + feed_forward(sub(params, "mlp"), norm("norm_2"), activation=relu)


def stack(params: Params, config: Any, x: np.ndarray, memory: np.ndarray | None = None, **options: Any) -> np.ndarray:
    """Block after block."""
    for index in range(config.num_stack):
        x = block(sub(params, f"blocks.{index}"), config, x, memory, **options)
    return x


def embedded(params: Params, tokens: np.ndarray) -> np.ndarray:
    """tokens (B, L) -> (B, L, E): a row of the table each, and its position."""
    table = params["embed.weight"]
    return table[tokens] + sinusoidal(tokens.shape[1], table.shape[1]).astype(table.dtype)


def from_embedded(
    params: Params, config: Any, x: np.ndarray, memory: np.ndarray | None = None, **options: Any
) -> np.ndarray:
    """What follows the table: (B, L, E) -> logits (B, L, V)."""
    return linear(sub(params, "unembed"), stack(sub(params, "decoder"), config.stack, x, memory, **options))


def encoder_decoder(
    params: Params, config: Any, tokens: np.ndarray, memory: np.ndarray | None = None, **options: Any
) -> np.ndarray:
    """tokens (B, L), memory (B, S, M) -> logits (B, L, V)."""
    return from_embedded(params, config, embedded(params, tokens), memory, **options)


def cross_entropy(logits: np.ndarray, labels: np.ndarray, padding_idx: int | None = None) -> np.ndarray:
    """The mean of -log softmax(logits)[label], label by label, over those that are no padding."""
    total, count = logits.dtype.type(0), 0
    for row, label in zip(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), strict=True):
        if label != padding_idx:
            top = row.max()
            total, count = total + top + np.log(np.exp(row - top).sum()) - row[label], count + 1
    return total / max(count, 1)
