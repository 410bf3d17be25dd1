"""Samples of linear layers in floats and packed, of packed tables, and of mixtures of packed experts.

Scales and biases of packed matrices are numbers that every dtype holds. Axes: I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ...nn.layers import QuantizedEmbedding
from ...nn.linear import Linear, QuantizedLinear
from ...nn.moe import MoE, MoEConfig
from ...nn.moe.experts import ExpertLinear
from ...reference.nn import linear as twin
from ...reference.nn.layers import linear
from ...reference.nn.moe import moe
from ..samples import Arrays, Case, Options, Rng, Sample, described, drawn, layer, with_params

_FORMS = ((2, 32, 64), (3, 32, 96), (4, 32, 64), (4, 64, 64), (5, 32, 32), (6, 64, 192), (8, 128, 128))
_SHAPES = ((3, 5), (1,), (), (2,), (101,), (1, 1))


def _linear(rng: Rng) -> Iterator[Sample]:
    for bias in (True, False):
        for shape in (*_SHAPES, (2, 0)):
            options: dict[str, Any] = {"input_dims": 13, "output_dims": 7, "bias": bias}
            params = drawn(Linear(**options), rng)
            yield Sample(described(x=(*shape, 13), bias=bias), {"x": rng.normal(size=(*shape, 13))}, options, params)
    options = {"input_dims": 257, "output_dims": 131}
    params = drawn(Linear(**options), rng)
    yield Sample("x=(67,257)", {"x": rng.normal(size=(67, 257))}, options, params, joint=True)
    yield Sample("x=(7,257), views with gaps", {"x": rng.normal(size=(7, 257))}, options, params, strided=True)


def _packed(rng: Rng, lead: tuple[int, ...], width: int, bits: int, group_size: int) -> dict[str, np.ndarray]:
    """A random packed matrix (*lead, I) of about unit gain."""
    size = 2.0 ** round(1 - bits - np.log2(width) / 2)
    scales = (1 + rng.integers(0, 128, (*lead, width // group_size)) / 128) * size
    words = twin.pack(rng.integers(0, 2**bits, (*lead, width)), bits)
    biases = -scales * 2 ** (bits - 1)
    return {"weight": words, "scales": scales.astype(np.float32), "biases": biases.astype(np.float32)}


def _sample(rng: Rng, shape: tuple[int, ...], I: int, O: int, bits: int, group_size: int, bias: bool) -> Sample:
    options = {"bits": bits, "group_size": group_size, "packed": _packed(rng, (O,), I, bits, group_size)}
    params = {"bias": rng.uniform(-0.2, 0.2, O)} if bias else {}
    x = rng.normal(size=(*shape, I))
    return Sample(
        described(x=x.shape, outputs=O, bits=bits, group_size=group_size, bias=bias), {"x": x}, options, params
    )


def _quantized_linear(rng: Rng) -> Iterator[Sample]:
    for index, (bits, group_size, I) in enumerate(_FORMS):
        for shape in _SHAPES:
            yield _sample(rng, shape, I, 17, bits, group_size, bias=index % 2 == 0)
    yield _sample(rng, (2,), 512, 300, 8, 64, bias=True)  # many words, which a CPU shares out among its workers
    yield _sample(rng, (7,), 512, 300, 4, 64, bias=False)


def _quantized_table(rng: Rng) -> Iterator[Sample]:
    for bits, group_size, E in _FORMS:
        for shape in _SHAPES[:3]:
            yield _sample(rng, shape, E, 17, bits, group_size, bias=False)


def _arrays(packed: Arrays, dtype: mx.Dtype) -> dict[str, mx.array]:
    """A packed matrix as a layer holds it, its scales in a dtype."""
    return {name: mx.array(x) if x.dtype == np.uint32 else mx.array(x).astype(dtype) for name, x in packed.items()}


def _ours(params: dict, arrays: dict, options: Options) -> mx.array:
    x, packed = arrays["x"], options["packed"]
    made = QuantizedLinear(x.shape[-1], 17, "bias" in params, options["group_size"], options["bits"])
    return with_params(made, {**params, **_arrays(packed, x.dtype)})(x)


def _twin(params: Arrays, arrays: Arrays, options: Options) -> np.ndarray:
    return twin.quantized_linear({**params, **options["packed"]}, arrays["x"], bits=options["bits"])


def _as_linear(params: dict, arrays: dict, options: Options) -> list[mx.array]:
    """The product with the table (O, I), and three of its rows."""
    x = arrays["x"]
    made = QuantizedEmbedding(17, x.shape[-1], options["group_size"], options["bits"])
    with_params(made, _arrays(options["packed"], x.dtype))
    return [made.as_linear(x), made(mx.array([16, 0, 5]))]


def _twin_as_linear(params: Arrays, arrays: Arrays, options: Options) -> list[np.ndarray]:
    table = twin.unpacked_weight(options["packed"], options["bits"], arrays["x"].dtype)
    return [_twin(params, arrays, options), table[[16, 0, 5]]]


# Mixtures of packed experts: with all experts chosen, rounding cannot change who is

_MIXTURES: dict[str, dict[str, Any]] = {
    "gated": {"num_experts": 3, "num_experts_per_tok": 3},
    "gated, biases": {"num_experts": 3, "num_experts_per_tok": 3, "bias": True, "activation": "gelu_tanh"},
    "plain": {"num_experts": 2, "num_experts_per_tok": 2, "gated": False, "activation": "gelu", "bias": True},
    "capacity": {"num_experts": 3, "num_experts_per_tok": 3, "capacity": 211},
}


def _mixture(rng: Rng) -> Iterator[Sample]:
    for what, given in _MIXTURES.items():
        config = MoEConfig(32, 64, **given)
        for bits in (4, 6, 8):
            params = drawn(MoE(config), rng)
            packed = {}
            for name in [name for name in params if name.startswith("experts.") and name.endswith(".weight")]:
                *lead, width = params.pop(name).shape
                packed[name.removesuffix(".weight")] = _packed(rng, tuple(lead), width, bits, 32)
            for tokens, evaluated in ((1, True), (13, True), (67, False)):
                options = {"config": config, "bits": bits, "packed": packed, "evaluated": evaluated}
                arrays = {"x": rng.normal(size=(tokens, 32))}
                facts = described(x=(tokens, 32), bits=bits, evaluated=evaluated)
                yield Sample(f"{what}: {facts}", arrays, options, params, joint=True)


def _our_mixture(params: dict, arrays: dict, options: Options) -> mx.array:
    made, x = MoE(options["config"]), arrays["x"]
    nn.quantize(made, 32, options["bits"], class_predicate=lambda _, module: isinstance(module, ExpertLinear))
    made.train(not options["evaluated"])
    held = {f"{name}.{leaf}": y for name, p in options["packed"].items() for leaf, y in _arrays(p, x.dtype).items()}
    return with_params(made, {**params, **held})(x)[0]


def _twin_mixture(params: Arrays, arrays: Arrays, options: Options) -> np.ndarray:
    x = arrays["x"]
    floats = {
        f"{name}.weight": twin.unpacked_weight(p, options["bits"], x.dtype) for name, p in options["packed"].items()
    }
    return moe({**params, **floats}, x, options["config"])[0]


CASES = {
    "Linear": Case(_linear, layer(Linear), lambda params, arrays, _: linear(params, **arrays)),
    "QuantizedLinear": Case(_quantized_linear, _ours, _twin),
    "QuantizedEmbedding": Case(_quantized_table, _as_linear, _twin_as_linear),
    "MoE.packed": Case(_mixture, _our_mixture, _twin_mixture, half=4.0, half_vjp=8.0),
}
