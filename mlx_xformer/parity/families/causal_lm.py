"""The layers of a converted decoder with its own weights, packed ones against their dequantised values, then all of it,
at once and, unless its experts have a capacity, through caches. A window that the samples do not outgrow is made
narrower on both sides.

Axes: B batch, L tokens, E embed_dim, V vocab_size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map

from ...models.causal_lm.model import Block, CausalLM
from ...reference.models import causal_lm as twin
from ..samples import Arrays, Case, Options, Rng, Sample, described, flat, with_params

_LENGTHS = (3, 13)
_CHUNKS = (4, 1, 5, 1, 2)  # positions that go through the caches at once, as many as the longest sample has
_WINDOW = 5  # instead of one that hides nothing of the longest sample


def causal_lm_cases(model: CausalLM) -> dict[str, Case]:
    """A case for the table, for every block, for the head, for what follows the table, and for that through caches. The
    model's floats become float32, which holds them exactly, and its window narrower where the samples are shorter."""
    model.update(
        tree_map(lambda x: x.astype(mx.float32) if mx.issubdtype(x.dtype, mx.floating) else x, model.parameters())
    )
    note = _narrow(model)
    config, weights = model.config, floats(model)
    cases = {"model.embed_tokens": _table(model, weights)}
    for index, layer in enumerate(model.model.layers):
        cases[f"model.layers.{index}"] = _block(
            model, layer, index, note if config.layer_window(index) is not None else ""
        )
    scale = float(np.abs(weights["model.embed_tokens.weight"]).mean()) * (config.embed_scale or 1.0)
    cases["logits"] = _fixed(model.logits, lambda x: twin.logits(weights, config, x), config.embed_dim, 1.0)

    def whole(ours: Callable[[mx.array], mx.array], what: str, lengths: tuple[int, ...]) -> Case:
        # Rounding alone moves the gradient of thirty layers by 1e-3, and each of them is proven.
        theirs = lambda x: twin.from_embedded(weights, config, x)  # noqa: E731
        return _fixed(ours, theirs, config.embed_dim, scale, vjp=False, note=what, lengths=lengths)

    cases["model"] = whole(lambda x: model.logits(model.model(x)), note, _LENGTHS)
    chunks = f", in chunks of {', '.join(map(str, _CHUNKS))}{note}"
    if config.moe is None or config.moe.capacity is None:  # else chunks overflow otherwise than the whole
        cases["model, cached"] = whole(lambda x: _cached(model, x), chunks, (sum(_CHUNKS),))
    return cases


def _narrow(model: CausalLM) -> str:
    """Makes the window of a model _WINDOW if the samples are no longer than it. Says so, for their descriptions. Layers
    keep what theirs differ from the configuration's by, so that a wrong one stays wrong."""
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


def _cached(model: CausalLM, x: mx.array) -> mx.array:
    """Embedded tokens (1, L, E), some at a time -> logits (1, L, V)."""
    caches, at, parts = model.make_caches(), 0, []
    for n in _CHUNKS:
        parts.append(model.logits(model.model(x[:, at : at + n], caches)))
        at += n
    return mx.concatenate(parts, axis=1)


def floats(module: nn.Module) -> Arrays:
    """The parameters by their flat names, packed matrices as the float32 values that they stand for."""
    params = {name: np.array(x) for name, x in flat(module).items()}
    for name, layer in module.named_modules():
        if "scales" in layer:
            packed = layer.weight, layer.scales, layer.biases
            values = mx.dequantize(*packed, group_size=layer.group_size, bits=layer.bits)
            prefix = f"{name}." if name else ""
            params[f"{prefix}weight"] = np.array(values.astype(mx.float32))
            del params[f"{prefix}scales"], params[f"{prefix}biases"]
    return params


def _table(model: CausalLM, weights: Arrays) -> Case:
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


def _block(model: CausalLM, layer: Block, index: int, note: str) -> Case:
    """A block: its floats are differentiated by as well, packed matrices are not. `note`: see _fixed."""
    packed = any("scales" in part for _, part in layer.named_modules())
    weights, given = floats(layer), {} if packed else floats(layer)

    def samples(rng: Rng) -> Iterator[Sample]:
        x = rng.normal(size=(2, _LENGTHS[-1], model.config.embed_dim))
        yield Sample(described(x=x.shape) + note, {"x": x}, {}, given, joint=True)

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
    note: str = "",
    lengths: tuple[int, ...] = _LENGTHS,
) -> Case:
    """A function of x (1, L, width) whose weights stay as they are: there may be too many to differentiate by. `note`
    ends the descriptions of the samples."""

    def samples(rng: Rng) -> Iterator[Sample]:
        for L in lengths:
            x = rng.normal(size=(1, L, width)) * scale
            yield Sample(described(x=x.shape) + note, {"x": x})

    return Case(samples, lambda _, arrays, __: ours(arrays["x"]), lambda _, arrays, __: theirs(arrays["x"]), vjp=vjp)
