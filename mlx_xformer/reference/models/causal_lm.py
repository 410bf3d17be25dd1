"""The decoder, step by step. Axes: B batch, L tokens, E embed_dim, V vocab_size.

Parameters may have a narrower dtype than the embeddings x, which sets that of the result.
"""

from dataclasses import asdict
from typing import Any

import numpy as np

from .. import backend
from ..nn.attention import attention_layer
from ..nn.layers import Params, gated_feed_forward, linear, rms_norm, sub
from ..nn.moe import Routing, moe


def embed(params: Params, config: Any, tokens: np.ndarray) -> np.ndarray:
    """Rows of the table: tokens (B, L) -> (B, L, E)."""
    x = params["model.embed_tokens.weight"][tokens]
    return x if config.embed_scale is None else x * np.asarray(config.embed_scale, x.dtype)


def block(params: Params, config: Any, index: int, x: np.ndarray, routings: list[Routing] | None = None) -> np.ndarray:
    """Layer `index`, x (B, L, E) -> the same; `routings` gets where a mixture's tokens went."""

    def norm(name: str, y: np.ndarray) -> np.ndarray:
        return rms_norm(sub(params, name), y, eps=config.norm_eps, plus_one=config.norm_plus_one)

    def feed(y: np.ndarray) -> np.ndarray:
        if config.has_mixture(index):
            y, routing = moe(sub(params, "mlp"), y, config.moe)
            if routings is not None:
                routings.append(routing)
            return y
        return gated_feed_forward(sub(params, "mlp"), y, activation=getattr(backend, config.activation))

    y = attend(sub(params, "self_attn"), config, index, norm("input_layernorm", x))
    if not config.sandwich_norms:
        x = x + y
        return x + feed(norm("post_attention_layernorm", x))
    x = x + norm("post_attention_layernorm", y)
    return x + norm("post_feedforward_layernorm", feed(norm("pre_feedforward_layernorm", x)))


def attend(params: Params, config: Any, index: int, x: np.ndarray) -> np.ndarray:
    """The attention of layer `index`: causal, within its window, with its positions."""
    B, L, _ = x.shape
    local = config.window is not None and (config.layer_types is None or config.layer_types[index] == "local")
    rotary: dict[str, Any] = {"dims": config.head_dim, "theta": config.rope_theta}
    if local and config.local_rope_theta is not None:
        rotary["theta"] = config.local_rope_theta
    elif config.rope_scaling is not None:
        rotary["scaling"] = asdict(config.rope_scaling)
    if config.qk_norm and config.norm_plus_one:
        params = {**params, **{f"{n}.weight": 1 + params[f"{n}.weight"].astype(x.dtype) for n in ("q_norm", "k_norm")}}
    return attention_layer(
        params,
        x,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        qk_norm="rms_whole" if config.qk_norm == "whole" else "rms" if config.qk_norm else None,
        norm_eps=config.norm_eps,
        rotary=rotary,
        positions=np.broadcast_to(np.arange(L), (B, L)),
        causal=True,
        window=config.window if local else None,
        softcap=config.attention_softcap,
        scale=config.attention_scale,
    )


def logits(params: Params, config: Any, x: np.ndarray) -> np.ndarray:
    """The norm at the end and the head, which may be the table: (B, L, E) -> (B, L, V)."""
    x = rms_norm(sub(params, "model.norm"), x, eps=config.norm_eps, plus_one=config.norm_plus_one)
    y = linear(sub(params, "model.embed_tokens" if config.tie_embeddings else "lm_head"), x)
    cap = config.logit_softcap
    return y if cap is None else cap * np.tanh(y / cap)


def from_embedded(params: Params, config: Any, x: np.ndarray, routings: list[Routing] | None = None) -> np.ndarray:
    """All but the table of embeddings: (B, L, E) -> (B, L, V)."""
    for index in range(config.num_layers):
        x = block(sub(params, f"model.layers.{index}"), config, index, x, routings)
    return logits(params, config, x)


def decoder(params: Params, config: Any, tokens: np.ndarray, *, routings: list[Routing] | None = None) -> np.ndarray:
    """Tokens (B, L) -> logits (B, L, V) of the tokens after them. `routings` gets the Routing of every mixture."""
    return from_embedded(params, config, embed(params, config, tokens), routings)
