"""The layers of a converted decoder with its own weights, packed ones against their dequantised values, then all of it.

Axes: B batch, L tokens, E embed_dim, V vocab_size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map

from ..models.decoder import Block, Decoder
from ..reference.models import decoder as twin
from .samples import Arrays, Case, Options, Rng, Sample, described, flat, with_params

_LENGTHS = (3, 13)


def decoder_cases(model: Decoder) -> dict[str, Case]:
    """A case for the table, for every block, for the head, and for what follows the table. The model's floats become
    float32, which holds them exactly."""
    model.update(
        tree_map(lambda x: x.astype(mx.float32) if mx.issubdtype(x.dtype, mx.floating) else x, model.parameters())
    )
    config, weights = model.config, floats(model)
    cases = {"model.embed_tokens": _table(model, weights)}
    for index, layer in enumerate(model.model.layers):
        cases[f"model.layers.{index}"] = _block(model, layer, index)
    scale = float(np.abs(weights["model.embed_tokens.weight"]).mean()) * (config.embed_scale or 1.0)
    cases["logits"] = _fixed(model.logits, lambda x: twin.logits(weights, config, x), config.embed_dim, 1.0)
    cases["model"] = _fixed(
        lambda x: model.logits(model.model(x)),
        lambda x: twin.from_embedded(weights, config, x),
        config.embed_dim,
        scale,
        vjp=False,  # rounding alone moves the gradient of thirty layers by 1e-3, and each of them is proven
    )
    return cases


def floats(module: nn.Module) -> Arrays:
    """The parameters by their flat names, packed matrices as the float32 values that they stand for."""
    params = {name: np.array(x) for name, x in flat(module).items()}
    for name, layer in module.named_modules():
        if isinstance(layer, (nn.QuantizedLinear, nn.QuantizedEmbedding)):
            packed = layer.weight, layer.scales, layer.biases
            values = mx.dequantize(*packed, group_size=layer.group_size, bits=layer.bits)
            prefix = f"{name}." if name else ""
            params[f"{prefix}weight"] = np.array(values.astype(mx.float32))
            del params[f"{prefix}scales"], params[f"{prefix}biases"]
    return params


def _table(model: Decoder, weights: Arrays) -> Case:
    """A look-up of tokens (2, L)."""

    def samples(rng: Rng) -> Iterator[Sample]:
        for L in _LENGTHS:
            tokens = rng.integers(0, model.config.vocab_size, (2, L))
            yield Sample(described(tokens=(2, L)), {}, {"tokens": tokens})

    return Case(
        samples,
        lambda _, __, options: model.embed(options["tokens"]),
        lambda _, __, options: twin.embed(weights, model.config, options["tokens"]),
        vjp=False,
    )


def _block(model: Decoder, layer: Block, index: int) -> Case:
    """A block: its floats are differentiated by as well, packed matrices are not."""
    packed = any(isinstance(part, nn.QuantizedLinear) for _, part in layer.named_modules())
    weights, given = floats(layer), {} if packed else floats(layer)

    def samples(rng: Rng) -> Iterator[Sample]:
        x = rng.normal(size=(2, _LENGTHS[-1], model.config.embed_dim))
        yield Sample(described(x=x.shape), {"x": x}, {}, given, joint=True)

    def ours(params: dict, arrays: dict, _: Options) -> Any:
        return (with_params(layer, params) if params else layer)(arrays["x"])

    def theirs(params: dict, arrays: Arrays, _: Options) -> np.ndarray:
        return twin.block(params or weights, model.config, index, arrays["x"])

    return Case(samples, ours, theirs)


def _fixed(
    ours: Callable[[mx.array], mx.array],
    theirs: Callable[[np.ndarray], np.ndarray],
    width: int,
    scale: float,
    *,
    vjp: bool = True,
) -> Case:
    """A function of x (1, L, width) whose weights stay as they are: there may be too many to differentiate by."""

    def samples(rng: Rng) -> Iterator[Sample]:
        for L in _LENGTHS:
            x = rng.normal(size=(1, L, width)) * scale
            yield Sample(described(x=x.shape), {"x": x})

    return Case(samples, lambda _, arrays, __: ours(arrays["x"]), lambda _, arrays, __: theirs(arrays["x"]), vjp=vjp)
