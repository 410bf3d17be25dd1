"""The cross-transformer of MetalAudio; and the layers of a model with its own weights, then all of them.

Axes: B batch, L tokens of a branch, E embed_dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.nn as nn

from ....models.guides.metalaudio import CrossTransformerConfig, CrossTransformerEncoder
from ....reference.models.guides import metalaudio as twin
from ...samples import Case, Options, Rng, Sample, described, drawn, with_params
from ..common import layer_case


def _samples(rng: Rng) -> Iterator[Sample]:
    for activation, biased, layers in (("gelu_tanh", True, 2), ("gelu", True, 1), ("gelu", False, 1)):
        options: dict[str, Any] = {"embed_dim": 15, "num_heads": 3, "num_layers": layers, "hidden_dim": 13}
        options |= {"activation": activation, "attention_bias": biased, "ffn_bias": biased}
        params = drawn(CrossTransformerEncoder(CrossTransformerConfig(**options)), rng)
        for L, M in ((7, 11), (1, 5), (13, 1)):
            arrays = {"time": rng.normal(size=(2, L, 15)), "freq": rng.normal(size=(2, M, 15))}
            yield Sample(described(time=(2, L, 15), freq=(2, M, 15), **options), arrays, options, params, joint=True)


def _ours(params: dict, arrays: dict, options: Options) -> Any:
    return with_params(CrossTransformerEncoder(CrossTransformerConfig(**options)), params)(**arrays)


def _theirs(params: dict, arrays: dict, options: Options) -> Any:
    return twin.cross_transformer_encoder(params, CrossTransformerConfig(**options), **arrays)


CASES = {
    "CrossTransformerEncoder": Case(_samples, _ours, _theirs, half=4.0, half_vjp=8.0),
}


# A model with its own weights


def examples() -> dict[str, nn.Module]:
    """Small models by what they are."""
    plain: dict[str, Any] = {"activation": "gelu", "attention_bias": False, "ffn_bias": False}
    return {
        "base": CrossTransformerEncoder(CrossTransformerConfig(18, 6, 2, 29)),
        "exact GELU, no biases": CrossTransformerEncoder(CrossTransformerConfig(18, 3, 2, 29, **plain)),
    }


def cases(model: CrossTransformerEncoder) -> dict[str, Case]:
    """A case for every layer, and one for all of them."""
    config = model.config
    sizes = [{"time": (2, L, config.embed_dim), "freq": (2, S, config.embed_dim)} for L, S in ((7, 11), (5, 1))]
    found = {
        f"layers.{index}": layer_case(
            layer, lambda params, arrays, _: twin.transformer_layer(params, config, **arrays), sizes
        )
        for index, layer in enumerate(model.layers)
    }
    found["model"] = layer_case(
        model, lambda params, arrays, _: twin.cross_transformer_encoder(params, config, **arrays), sizes
    )
    return found
