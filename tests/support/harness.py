"""What comparisons share: drawn parameters, results and gradients before parity's judge, decibels, golden files."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from mlx_xformer import parity
from mlx_xformer.parity import judge

Params = dict[str, np.ndarray]


def data_folder() -> Path:
    """The folder of checkpoints and recordings that may not be shipped; unset is an error, never a skip."""
    folder = os.environ.get("MLX_XFORMER_DATA")
    assert folder, "MLX_XFORMER_DATA must name the folder of test data (make test-real)"
    assert Path(folder).is_dir(), f"MLX_XFORMER_DATA names no folder: {folder}"
    return Path(folder)


def draw(module: nn.Module, seed: int) -> Params:
    """Gives `module` float32 parameters with no zeros or ones among gains and biases; returns them as float64.

    Matrices keep about unit gain; LayerScale is U(0.3, 0.9), gains U(0.7, 1.3), biases U(-0.2, 0.2).
    """
    rng = np.random.default_rng(seed)
    params: Params = {}
    for name, value in tree_flatten(module.parameters()):
        leaf = name.rsplit(".", 1)[-1]
        if leaf == "scale":
            array = rng.uniform(0.3, 0.9, value.shape)
        elif leaf == "bias":
            array = rng.uniform(-0.2, 0.2, value.shape)
        elif value.ndim == 1:
            array = rng.uniform(0.7, 1.3, value.shape)
        else:
            array = rng.normal(size=value.shape) * np.prod(value.shape[1:]) ** -0.5
        params[name] = array.astype(np.float32).astype(np.float64)
    set_params(module, params)
    return params


def set_params(module: nn.Module, params: Params) -> None:
    """Loads flat NumPy parameters strictly, as float32."""
    module.load_weights([(name, mx.array(array.astype(np.float32))) for name, array in params.items()], strict=True)


def as32(value):
    """float64 arrays of a nested structure as float32, the rest as it is."""
    if isinstance(value, dict):
        return {key: as32(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(as32(entry) for entry in value)
    if isinstance(value, np.ndarray) and value.dtype == np.float64:
        return value.astype(np.float32)
    return value


def assert_within_budget(actual, ref64: np.ndarray, ref32: np.ndarray, name: str = "output") -> None:
    """The judge's tolerance in float32, and nothing may be NaN or infinite."""
    actual = np.asarray(actual)
    assert ref64.dtype in (np.float64, np.complex128), f"{name}: the truth must be in double precision"
    assert ref32.dtype in (np.float32, np.complex64), f"{name}: the twin in float32 must be in single precision"
    assert np.isfinite(actual).all() and np.isfinite(ref64).all(), f"{name}: not finite"
    verdict = judge.compare(actual, ref64, judge.value_tolerance(ref64, ref32))
    assert verdict.passed, f"{name}: {verdict.why}"


def check_forward(call: Callable, twin: Callable, *args) -> None:
    """call(*float32 MLX arrays) against twin(*NumPy arrays) in both precisions."""
    ref64, ref32 = twin(*args), twin(*as32(args))
    actual = call(*[mx.array(as32(a)) if isinstance(a, np.ndarray) else a for a in args])
    many = isinstance(ref64, (tuple, list))
    for i, (a, r, s) in enumerate(
        zip(*((actual, ref64, ref32) if many else ([actual], [ref64], [ref32])), strict=True)
    ):
        assert_within_budget(a, r, s, f"output {i}")


def check_gradient(call: Callable, twin: Callable, *args: np.ndarray, seed: int = 0, directions: int = 2) -> None:
    """<vjp(u), t> of `call` against central differences of the float64 twin, for each array argument in turn.

    The judge's tolerance without its allowances for rounding: with the longer step the difference quotient is good to
    about 1e-9.
    """
    rng = np.random.default_rng(seed)
    cotangent = rng.normal(size=twin(*args).shape)
    _, gradients = mx.vjp(call, [mx.array(as32(a)) for a in args], [mx.array(as32(cotangent))])
    names = [f"argument {i}" for i in range(len(args))]
    found = {name: np.array(g, np.float64) for name, g in zip(names, gradients, strict=True)}
    for name, g in found.items():
        assert np.isfinite(g).all(), f"{name}: the gradient is not finite"
    given = dict(zip(names, args, strict=True))
    along = [[name] for name in names for _ in range(directions)]
    verdict = judge.compare_gradients(
        found, lambda arrays: [twin(*arrays.values())], given, [cotangent], rng, along, step=1e-6
    )
    assert verdict.passed, verdict.why


def check_module(module: nn.Module, twin: Callable, *inputs: np.ndarray, seed: int = 0, gradient: bool = True) -> None:
    """A module against twin(params, *inputs): forward within the budget, gradients of every parameter and input."""
    params = draw(module, seed)
    names = list(params)

    def call(*arrays):
        module.update(tree_unflatten(list(zip(names, arrays[: len(names)], strict=True))))
        return module(*arrays[len(names) :])

    def flat_twin(*arrays):
        return twin(dict(zip(names, arrays[: len(names)], strict=True)), *arrays[len(names) :])

    arrays = [params[name] for name in names] + list(inputs)
    check_forward(call, flat_twin, *arrays)
    if gradient:
        check_gradient(call, flat_twin, *arrays, seed=seed)
    set_params(module, params)


class _Tap:
    """A layer that notes what it returns (of several outputs the first, unless `whole`)."""

    def __init__(self, layer, name: str, taps: dict, whole: bool = False):
        self._layer, self._name, self._taps, self._whole = layer, name, taps, whole

    def __call__(self, *args):
        out = self._layer(*args)
        self._taps[self._name] = out[0] if isinstance(out, tuple) and not self._whole else out
        return out

    def __getattr__(self, name):
        return getattr(self._layer, name)


def tap(model) -> dict[str, mx.array]:
    """Makes an HTDemucs note the output of its layers; returns the dict that a forward pass fills, by name."""
    taps: dict[str, mx.array] = {}

    def wrap_list(owner, prefix, attribute):
        layers = [_Tap(layer, f"{prefix}{attribute}.{i}", taps) for i, layer in enumerate(getattr(owner, attribute))]
        setattr(owner, attribute, layers)

    for attribute in ("encoder", "tencoder", "decoder", "tdecoder"):
        wrap_list(model, "", attribute)
    for attribute in [name for name in model if name.startswith("channel_")]:
        layer = _Tap(model.pop(attribute), attribute, taps)
        object.__setattr__(model, attribute, layer)
    if model.config.t_layers:
        wrap_list(model.crosstransformer, "crosstransformer.", "layers")
        wrap_list(model.crosstransformer, "crosstransformer.", "layers_t")
        layer = _Tap(model.pop("crosstransformer"), "crosstransformer", taps, whole=True)
        object.__setattr__(model, "crosstransformer", layer)
    object.__setattr__(model, "_spectrogram", _Tap(model._spectrogram, "spectrogram", taps))
    return taps


def pytorch_layout(name: str, value) -> np.ndarray:
    """A tapped activation in PyTorch's layout: spectrogram (B, C, F, T), waveform (B, C, T), tokens as they are."""
    value = np.array(value)
    if "layers" in name:
        return value
    value = value.transpose(0, 3, 2, 1) if value.ndim == 4 else value.transpose(0, 2, 1)
    return value.reshape(*value.shape[:2], -1) if name in ("channel_upsampler", "channel_downsampler") else value


def snr_db(expected: np.ndarray, actual: np.ndarray) -> float:
    """10 log10 of the energy of `expected` over that of the difference, in dB."""
    expected, actual = np.asarray(expected, np.float64), np.asarray(actual, np.float64)
    assert expected.shape == actual.shape, f"shape {actual.shape}, expected {expected.shape}"
    noise = np.square(actual - expected).sum()
    return float("inf") if noise == 0 else float(10 * np.log10(np.square(expected).sum() / noise))


def stem_snr_db(expected: np.ndarray, actual: np.ndarray) -> list[float]:
    """snr_db for each entry of the first axis."""
    return [snr_db(e, a) for e, a in zip(expected, actual, strict=True)]


def same_tensors(a, b):
    assert a.keys() == b.keys()
    for name, x in a.items():
        y = b[name]
        assert x.shape == y.shape and x.dtype == y.dtype, name
        assert mx.array_equal(mx.view(x, mx.uint8), mx.view(y, mx.uint8)), name


def signal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape) * 1.7 + 0.4


def golden(name):
    with np.load(data_folder() / "golden" / f"{name}.npz") as stored:
        return {key: stored[key] for key in stored.files}


def proven(folder):
    report = parity.run(folder=folder, seeds=1)
    assert not report.failed, report.table()
