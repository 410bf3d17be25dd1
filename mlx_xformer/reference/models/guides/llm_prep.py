"""The models of llm_prep, step by step. `config` has the fields of models.guides.llm_prep.SequenceConfig.

Axes: B batch, L positions, S source positions, I input_dim, E embed_dim, O output_dim, V vocab_size.
"""

from types import SimpleNamespace
from typing import Any

import numpy as np

from ...nn.layers import Params, linear, sub
from ...nn.positions import sinusoidal
from ...nn.transformer import stack


def layer_config(config: Any, *, causal: bool, cross: bool = False) -> SimpleNamespace:
    """The fields of a layer that nn.transformer.layer reads: post-norm, with ReLU or a mixture of experts with ReLU."""
    groups = config.num_kv_heads if config.num_kv_heads is not None else max(1, config.num_heads // 2)
    shared = {"mha": config.num_heads, "mqa": 1, "gqa": groups}
    moe = None
    if config.ffn.use_moe:
        moe = SimpleNamespace(
            num_experts=config.ffn.num_experts,
            num_experts_per_tok=config.ffn.topk,
            capacity=config.ffn.capacity,
            renormalize=config.ffn.renormalize,
            alpha=config.ffn.alpha,
            **{"router": "softmax", "groups": 1, "groups_per_tok": 1, "selection_bias": False, "scale": 1.0},
            **{"activation": "relu", "gated": False, "overflow": "expert", "shared_dim": 0, "shared_gate": False},
        )
    return SimpleNamespace(
        num_heads=config.num_heads,
        num_kv_heads=shared[config.attention_type],
        scale=None,
        causal=causal,
        window=config.window if causal else None,
        cross=cross,
        **{"norm": "layer", "norm_eps": 1e-5, "norm_first": False, "gated": False, "activation": "relu"},
        moe=moe,
    )


def projected(params: Params, name: str, x: np.ndarray) -> np.ndarray:
    """x (B, L, I) -> (B, L, E), with positions; tokens (B, L) are rows of the table first."""
    x = params["embed_tokens.weight"][x] if x.dtype.kind in "iu" else x
    y = linear(sub(params, name), x)
    return y + sinusoidal(*y.shape[1:]).astype(y.dtype)


def answer(params: Params, x: np.ndarray) -> np.ndarray:
    """(B, L, E) -> (B, L, O), or with a head (B, L, V)."""
    y = linear(sub(params, "out_proj"), x)
    return linear(sub(params, "lm_head"), y) if "lm_head.weight" in params else y


def regression(params: Params, config: Any, x: np.ndarray, *, mask: np.ndarray | None = None) -> np.ndarray:
    """x (B, L, I) -> (B, O); mask (B, L), True where there is no padding."""
    y = projected(params, "input_proj", x)
    seen = None if mask is None else mask[:, None, None]
    y = stack(sub(params, "stack"), layer_config(config, causal=False), y, mask=seen)
    means = []
    for b in range(len(y)):
        valid = y[b] if mask is None else y[b][mask[b]]
        means.append(valid.mean(axis=0) if len(valid) else np.zeros_like(y[b, 0]))
    return linear(sub(params, "out_proj"), np.stack(means))


def autoregressive(params: Params, config: Any, x: np.ndarray) -> np.ndarray:
    """x (B, L, I) -> (B, L, O), or tokens (B, L) -> logits (B, L, V)."""
    y = projected(params, "input_proj", x)
    return answer(params, stack(sub(params, "stack"), layer_config(config, causal=True), y))


def encode(params: Params, config: Any, source: np.ndarray, *, source_mask: np.ndarray | None = None) -> np.ndarray:
    """source (B, S, I) -> the memory (B, S, E)."""
    x = projected(params, "encoder_input_proj", source)
    seen = None if source_mask is None else source_mask[:, None, None]
    return stack(sub(params, "encoder"), layer_config(config, causal=False), x, mask=seen)


def decode(
    params: Params, config: Any, target: np.ndarray, memory: np.ndarray, *, memory_mask: np.ndarray | None = None
) -> np.ndarray:
    """target (B, L, I) or tokens (B, L), memory (B, S, E) -> (B, L, O or V)."""
    y = projected(params, "decoder_input_proj", target)
    seen = None if memory_mask is None else memory_mask[:, None, None]
    own = layer_config(config, causal=True, cross=True)
    return answer(params, stack(sub(params, "decoder"), own, y, memory, memory_mask=seen))


def encoder_decoder(
    params: Params, config: Any, source: np.ndarray, target: np.ndarray, *, source_mask: np.ndarray | None = None
) -> np.ndarray:
    """source (B, S, I) and a target to what follows each of its positions."""
    memory = encode(params, config, source, source_mask=source_mask)
    return decode(params, config, target, memory, memory_mask=source_mask)
