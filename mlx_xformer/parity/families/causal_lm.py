"""CausalLM: its blocks with the model's own weights, packed ones against their dequantised values, then all of it, at
once and, unless its experts have a capacity, through caches. A window that the samples do not outgrow is made narrower
on both sides.

Axes: B batch, L tokens, E embed_dim, V vocab_size.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map

from ...models.causal_lm.config import CausalLMConfig, Quantization
from ...models.causal_lm.model import Block, CausalLM
from ...nn.moe import MoEConfig
from ...nn.rotary import RotaryScaling
from ...reference.models import causal_lm as twin
from ..samples import Arrays, Case, Options
from .common import CHUNKS, chunks_in_words, fixed_case, in_chunks, layer_case, table_case, weights_of

_LENGTHS = (3, sum(CHUNKS))
_WINDOW = 5  # instead of one that hides nothing of the longest sample


_GEMMA: dict[str, Any] = {
    **{"norm_plus_one": True, "sandwich_norms": True, "activation": "gelu_tanh", "tie_embeddings": True, "window": 3},
    **{"embed_scale": 4.8, "attention_scale": 0.24, "layer_types": ("local", "global"), "num_kv_heads": 1},
}
_SIZES: dict[str, Any] = {"vocab_size": 31, "embed_dim": 22, "num_layers": 2, "num_heads": 6, "num_kv_heads": 2}
_SIZES |= {"hidden_dim": 29, "head_dim": 10}
_EXPERTS: dict[str, Any] = {"embed_dim": 22, "hidden_dim": 13, "num_experts": 5, "num_experts_per_tok": 2}
_EXAMPLES: dict[str, dict[str, Any]] = {
    "llama": {"rope_scaling": RotaryScaling("llama3", 8.0, 97), "rope_theta": 5e4},
    "qwen 2": {"attention_bias": ("q", "k", "v"), "tie_embeddings": True},
    "qwen 3, experts": {"qk_norm": True, "moe": MoEConfig(**_EXPERTS)},
    "gemma 2": {**_GEMMA, "attention_softcap": 1.3, "logit_softcap": 0.7},
    "gemma 3": {**_GEMMA, "qk_norm": True, "rope_theta": 1e6, "local_rope_theta": 77.0},
    "quantized": {"embed_dim": 32, "hidden_dim": 64, "head_dim": 16, "quantization": Quantization(4, 32)},
}


def examples() -> dict[str, nn.Module]:
    """Small models by what they are."""
    return {name: CausalLM(CausalLMConfig(**{**_SIZES, **options})) for name, options in _EXAMPLES.items()}


def cases(model: CausalLM) -> dict[str, Case]:
    """A case for the table, for every block, for the head, for what follows the table, and for that through caches. The
    model's floats become float32, which holds them exactly, and its window narrower where the samples are shorter."""
    model.update(
        tree_map(lambda x: x.astype(mx.float32) if mx.issubdtype(x.dtype, mx.floating) else x, model.parameters())
    )
    note = _narrow(model)
    config, weights, E = model.config, floats(model), model.config.embed_dim
    found = {
        "model.embed_tokens": table_case(
            model.embed, lambda tokens: twin.embed(weights, config, tokens), config.vocab_size, _LENGTHS
        )
    }
    for index, layer in enumerate(model.model.layers):
        local = config.layer_window(index) is not None
        found[f"model.layers.{index}"] = _block(model, layer, index, note if local else "")
    sizes = [{"x": (1, L, E)} for L in _LENGTHS]
    found["logits"] = fixed_case(model.logits, lambda x: twin.logits(weights, config, x), sizes)

    def at_once(x: mx.array) -> mx.array:
        return model.logits(model.model(x))

    def cached(x: mx.array) -> mx.array:
        caches = model.make_caches()
        return in_chunks(lambda part: model.logits(model.model(part, caches)), x)

    def theirs(x: np.ndarray) -> np.ndarray:
        return twin.from_embedded(weights, config, x)

    scale = float(np.abs(weights["model.embed_tokens.weight"]).mean()) * (config.embed_scale or 1.0)
    found["model"] = fixed_case(at_once, theirs, sizes, scale=scale, vjp=False, note=note)
    if config.moe is None or config.moe.capacity is None:  # else other tokens overflow in chunks than at once
        note = chunks_in_words() + note
        found["model, cached"] = fixed_case(cached, theirs, sizes[-1:], scale=scale, vjp=False, note=note)
    return found


def _narrow(model: CausalLM) -> str:
    """Makes the window of a model _WINDOW if the samples are no longer than it, and returns what their descriptions say
    about it. A layer whose window is not the configuration's keeps the difference, so that a wrong one stays wrong."""
    config = model.config
    if config.window is None or config.window < _LENGTHS[-1]:
        return ""
    model.config = dataclasses.replace(config, window=_WINDOW)
    for layer in model.model.layers:
        own = layer.self_attn.config
        if own.window is not None:
            window = max(1, own.window - config.window + _WINDOW)
            layer.self_attn.config = dataclasses.replace(own, window=window)
    return f", window {_WINDOW} instead of {config.window}"


def floats(module: nn.Module) -> Arrays:
    """The parameters by their flat names, packed matrices as the float32 values that they stand for."""
    params = weights_of(module)
    for name, layer in module.named_modules():
        if "scales" in layer:
            packed = layer.weight, layer.scales, layer.biases
            values = mx.dequantize(*packed, group_size=layer.group_size, bits=layer.bits)
            prefix = f"{name}." if name else ""
            params[f"{prefix}weight"] = np.array(values.astype(mx.float32))
            del params[f"{prefix}scales"], params[f"{prefix}biases"]
    return params


def _block(model: CausalLM, block: Block, index: int, note: str) -> Case:
    """A block: its floats are differentiated by as well, packed matrices are not. `note` ends its description."""
    sizes = [{"x": (2, _LENGTHS[-1], model.config.embed_dim)}]
    if any("scales" in part for _, part in block.named_modules()):
        weights = floats(block)
        return fixed_case(block, lambda x: twin.block(weights, model.config, index, x), sizes, note=note)

    def theirs(params: Arrays, arrays: Arrays, _: Options) -> np.ndarray:
        return twin.block(params, model.config, index, arrays["x"])

    return layer_case(block, theirs, sizes, note=note)
