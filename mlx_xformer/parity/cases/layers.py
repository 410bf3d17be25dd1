"""Samples of norms, feed-forward networks, tables and convolutions.

Axes: B batch, T time, F frequencies, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from ...backend import activations
from ...nn import layers
from ...reference import backend as twin_backend
from ...reference.nn import layers as twin
from ...reference.nn import positions
from ..samples import NO_QUOTIENT, Arrays, Case, Options, Rng, Sample, described, drawn, layer, signal, with_params

# Norms


def _layer_norm(rng: Rng) -> Iterator[Sample]:
    for dims in (1, 3, 5, 7, 48, 64, 96, 255, 511, 1024, 1025, 1537):
        for shape in ((2, 5), (1,), (3, 2, 1, 2)):
            yield _of_module(rng, layers.LayerNorm, {"dims": dims}, *shape, dims)
    yield _of_module(rng, layers.LayerNorm, {"dims": 7}, 3, 0, 7)
    yield _of_module(rng, layers.LayerNorm, {"dims": 48, "eps": 0.1}, 7, 48)
    yield _of_module(rng, layers.LayerNorm, {"dims": 48}, 7, 48, strided=True)
    odd = _of_module(rng, layers.LayerNorm, {"dims": 48}, 7, 48, what="NaN", skip_vjp=NO_QUOTIENT)
    odd.arrays["x"][3, 5] = np.nan
    yield odd
    yield _of_module(rng, layers.LayerNorm, {"dims": 1537}, 7, 1537, what="mean 10", level=10)


def _rms_norm(rng: Rng) -> Iterator[Sample]:
    for dims in (1, 3, 48, 255, 1024, 1025, 1537):
        for shape in ((2, 5), (1,), (3, 2, 1, 2)):
            for plus_one in (False, True):
                yield _of_module(rng, layers.RMSNorm, {"dims": dims, "plus_one": plus_one}, *shape, dims)
    yield _of_module(rng, layers.RMSNorm, {"dims": 7}, 3, 0, 7)
    yield _of_module(rng, layers.RMSNorm, {"dims": 48, "eps": 0.1}, 7, 48)
    yield _of_module(rng, layers.RMSNorm, {"dims": 48}, 7, 48, strided=True)
    odd = _of_module(rng, layers.RMSNorm, {"dims": 48}, 7, 48, what="NaN", skip_vjp=NO_QUOTIENT)
    odd.arrays["x"][3, 5] = np.nan
    yield odd


def _whole_rms_norm(rng: Rng) -> Iterator[Sample]:
    for heads, dims in ((1, 7), (2, 3), (5, 48), (3, 350)):
        for B, L in ((2, 5), (1, 1), (3, 0)):
            options = {"dims": heads * dims, "eps": 1e-2 if heads == 2 else 1e-6}
            yield _of_module(rng, layers.WholeRMSNorm, options, B, heads, L, dims)
    yield _of_module(rng, layers.WholeRMSNorm, {"dims": 33}, 2, 3, 5, 11, strided=True)


def _group_norm(rng: Rng) -> Iterator[Sample]:
    for groups in (1, 2, 6):
        for axes in (None, (1,), (1, 2)):
            options = {"num_groups": groups, "dims": 6, "axes": axes}
            yield _of_module(rng, layers.GroupNorm, options, 2, 7, 5, 6, called=("axes",))
            yield _of_module(rng, layers.GroupNorm, options, 1, 211, 3, 6, called=("axes",))
    yield _of_module(rng, layers.GroupNorm, {"num_groups": 1, "dims": 5}, 1, 40_013, 5)
    yield _of_module(rng, layers.GroupNorm, {"num_groups": 5, "dims": 5, "eps": 0.1}, 3, 5)
    yield _of_module(rng, layers.GroupNorm, {"num_groups": 2, "dims": 6}, 2, 11, 6, strided=True)


def _of_module(
    rng: Rng,
    make: Callable[..., Any],
    options: dict[str, Any],
    *shape: int,
    called: tuple[str, ...] = (),
    what: str = "",
    level: float = 0.4,
    **flags: Any,
) -> Sample:
    """A sample of a module that takes one array of this shape."""
    made = make(**{name: value for name, value in options.items() if name not in called})
    facts = described(shape=shape, **options, strided=flags.get("strided"))
    arrays = {"x": rng.normal(size=shape) * 1.7 + level}
    return Sample(f"{facts} ({what})" if what else facts, arrays, options, drawn(made, rng), **flags)


def _twin_group_norm(params: Arrays, arrays: Arrays, options: Options) -> np.ndarray:
    kept = {name: value for name, value in options.items() if name != "dims"}
    return twin.group_norm(params, arrays["x"], **kept)


# Feed-forward networks, tables and convolutions


def _layer_scale(rng: Rng) -> Iterator[Sample]:
    for dims in (1, 7, 48):
        for shape in ((2, 5), (), (1,), (3, 11, 2), (1, 1, 13), (197,), (2, 67)):
            yield _of_module(rng, layers.LayerScale, {"dims": dims}, *shape, dims)
    yield _of_module(rng, layers.LayerScale, {"dims": 7}, 0, 7)
    yield _of_module(rng, layers.LayerScale, {"dims": 7}, 2, 5, 7, strided=True)


def _positional_encoding(rng: Rng) -> Iterator[Sample]:
    for dims, shape in ((8, (2, 5)), (13, (1, 1)), (7, (3, 0)), (22, (11,)), (2, (2, 211))):
        for given in ({}, {"offset": 3}, {"offset": 57, "max_period": 100.0}):
            sample = {"x": signal(rng, *shape, dims)}
            yield Sample(described(x=(*shape, dims), **given), sample, {"embed_dim": dims, **given})


def _twin_positional_encoding(params: Arrays, arrays: Arrays, options: Options) -> np.ndarray:
    given = {name: options[name] for name in ("offset", "max_period") if name in options}
    return positions.positional_encoding(arrays["x"], **given)


def _feed_forward(rng: Rng) -> Iterator[Sample]:
    for activation in ("gelu", "gelu_tanh", "relu"):
        options = {"embed_dim": 7, "hidden_dim": 13, "activation": activation}
        samples = [
            _of_module(rng, layers.FeedForward, options, *shape, 7)
            for shape in ((2, 5), (1,), (101,), (), (3, 2, 1, 2), (13, 3))
        ]
        samples.append(_of_module(rng, layers.FeedForward, options, 2, 5, 7, strided=True))
        if activation == "relu":  # far from 0, where rounding would change the sign and with it the derivative
            for sample in samples:
                sample.params["linear1.bias"] = rng.uniform(12, 13, 13) * rng.choice([-1, 1], 13)
        else:
            samples.append(_of_module(rng, layers.FeedForward, {**options, "bias": False}, 2, 5, 7))
        yield from samples
    yield _of_module(rng, layers.FeedForward, options, 0, 7)


def _gated(rng: Rng) -> Iterator[Sample]:
    for activation in activations.GATED:
        options = {"embed_dim": 7, "hidden_dim": 13, "activation": activation}
        for shape in ((2, 5), (1,), (101,), (), (3, 2, 1, 2)):
            yield _of_module(rng, layers.GatedFeedForward, options, *shape, 7)
        yield _of_module(rng, layers.GatedFeedForward, {**options, "bias": True}, 2, 5, 7)
        yield _of_module(rng, layers.GatedFeedForward, options, 2, 5, 7, strided=True)
    wide = {"embed_dim": 67, "hidden_dim": 131}
    yield _of_module(rng, layers.GatedFeedForward, wide, 211, 67)


def _gated_row(rng: Rng) -> Iterator[Sample]:
    for activation in activations.GATED:
        for biased in (False, True):
            options = {"embed_dim": 7, "hidden_dim": 13, "activation": activation, "bias": biased}
            for shape in ((1,), (), (1, 1)):
                yield _of_module(rng, layers.GatedFeedForward, options, *shape, 7)


def _embedding(rng: Rng) -> Iterator[Sample]:
    for shape in ((2, 5), (1,), (101,), (), (3, 2, 1, 2)):
        yield _of_module(rng, layers.Embedding, {"num_embeddings": 13, "dims": 7}, *shape, 7)


def _dilated(rng: Rng) -> Iterator[Sample]:
    for kernel_size, dilation in ((3, 1), (3, 2), (3, 5), (5, 3), (1, 1)):
        options = {"in_channels": 5, "out_channels": 2, "kernel_size": kernel_size, "dilation": dilation}
        for shape in ((2, 17), (1, 1), (2, 3), (2, 11, 3)):
            yield _of_module(rng, layers.DilatedConv1d, options, *shape, 5)
    yield _of_module(rng, layers.DilatedConv1d, options, 2, 17, 5, strided=True)


def _twin_dilated(params: Arrays, arrays: Arrays, options: Options) -> np.ndarray:
    """Every row of (B, T, F, C) is a sequence of its own."""
    x, dilation = arrays["x"], options["dilation"]
    rows = x[:, :, None] if x.ndim == 3 else x
    reach = options["kernel_size"] // 2 * dilation
    done = [twin.conv1d(params, rows[:, :, f], padding=reach, dilation=dilation) for f in range(rows.shape[2])]
    return done[0] if x.ndim == 3 else np.stack(done, axis=2)


def _transposed(rng: Rng) -> Iterator[Sample]:
    for kernel_size, stride in ((8, 4), (4, 2), (7, 3), (2, 5), (1, 1), (4, 4)):
        options = {"in_channels": 5, "out_channels": 3, "kernel_size": kernel_size, "stride": stride}
        for shape in ((2, 11), (1, 1), (1, 101)):
            yield _of_module(rng, layers.ConvTranspose1d, options, *shape, 5)
    yield _of_module(rng, layers.ConvTranspose1d, options, 2, 11, 5, strided=True)


def _twin_layer_norm(params: Arrays, arrays: Arrays, options: Options) -> np.ndarray:
    return twin.layer_norm(params, arrays["x"], eps=options.get("eps", 1e-5))


def _twin_rms_norm(params: Arrays, arrays: Arrays, options: Options) -> np.ndarray:
    return twin.rms_norm(params, arrays["x"], options.get("eps", 1e-5), options.get("plus_one", False))


def _twin_whole_rms_norm(params: Arrays, arrays: Arrays, options: Options) -> np.ndarray:
    return twin.whole_rms_norm(params, arrays["x"], options.get("eps", 1e-5))


def _twin_gated(params: Arrays, arrays: Arrays, options: Options) -> np.ndarray:
    activation = getattr(twin_backend, options.get("activation", "silu"))
    return twin.gated_feed_forward(params, arrays["x"], activation=activation)


def _as_linear(params: dict, arrays: dict, options: Options) -> Any:
    return with_params(layers.Embedding(**options), params).as_linear(**arrays)


def _twin_feed_forward(params: Arrays, arrays: Arrays, options: Options) -> np.ndarray:
    return twin.feed_forward(params, arrays["x"], activation=getattr(twin_backend, options["activation"]))


CASES = {
    "LayerNorm": Case(_layer_norm, layer(layers.LayerNorm), _twin_layer_norm),
    "RMSNorm": Case(_rms_norm, layer(layers.RMSNorm), _twin_rms_norm),
    "WholeRMSNorm": Case(_whole_rms_norm, layer(layers.WholeRMSNorm), _twin_whole_rms_norm),
    "GroupNorm": Case(_group_norm, layer(layers.GroupNorm, "axes"), _twin_group_norm),
    "LayerScale": Case(_layer_scale, layer(layers.LayerScale), lambda p, x, _: twin.layer_scale(p, **x)),
    "PositionalEncoding": Case(
        _positional_encoding, layer(layers.PositionalEncoding, "offset"), _twin_positional_encoding
    ),
    "FeedForward": Case(_feed_forward, layer(layers.FeedForward), _twin_feed_forward),
    "GatedFeedForward": Case(_gated, layer(layers.GatedFeedForward), _twin_gated),
    "GatedFeedForward.step": Case(_gated_row, layer(layers.GatedFeedForward), _twin_gated),
    "Embedding": Case(_embedding, _as_linear, lambda p, x, _: twin.linear(p, **x)),
    "DilatedConv1d": Case(_dilated, layer(layers.DilatedConv1d), _twin_dilated),
    "ConvTranspose1d": Case(
        _transposed,
        layer(layers.ConvTranspose1d),
        lambda p, x, options: twin.conv_transpose1d(p, **x, stride=options["stride"]),
    ),
}
