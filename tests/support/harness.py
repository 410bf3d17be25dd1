"""What comparisons share: drawn parameters, the derived budget, gradients against differences, golden files."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from mlx_xformer import parity

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
    """|actual - ref64| <= 4 max|ref32 - ref64| + 1e-6 max|ref64|, where float32 NumPy sets the budget."""
    actual = np.asarray(actual)
    assert ref64.dtype in (np.float64, np.complex128), f"{name}: the truth must be in double precision"
    assert ref32.dtype in (np.float32, np.complex64), f"{name}: the budget must be in single precision"
    assert actual.shape == ref64.shape, f"{name}: shape {actual.shape}, expected {ref64.shape}"
    assert np.isfinite(actual).all(), f"{name}: not finite"
    budget = 4 * np.abs(ref32 - ref64).max(initial=0) + 1e-6 * np.abs(ref64).max(initial=0)
    error = np.abs(actual - ref64).max(initial=0)
    assert error <= budget, f"{name}: error {error:.3g} is {error / max(budget, 1e-300):.1f} budgets"


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

    The difference quotient is good to about 1e-9, so the tolerance is float32's: 2e-5 of |vjp| |t|, and, for arguments
    whose gradient cancels (the bias of the keys), 2e-6 of the largest gradient.
    """
    rng = np.random.default_rng(seed)
    cotangent = rng.normal(size=twin(*args).shape)
    u = mx.array(cotangent.astype(np.float32))
    arrays = [mx.array(as32(a)) for a in args]
    _, gradients = mx.vjp(lambda *a: call(*a), arrays, [u])
    gradients = [np.array(g, np.float64) for g in gradients]
    largest = max(np.linalg.norm(g) for g in gradients)
    for i, (arg, g) in enumerate(zip(args, gradients, strict=True)):
        assert np.isfinite(g).all(), f"argument {i}: the gradient is not finite"
        for _ in range(directions):
            t, step = rng.normal(size=arg.shape), 1e-6 * max(arg.size, 1) ** 0.5
            t /= max(np.linalg.norm(t), 1e-300)
            plus = twin(*[a + step * t if j == i else a for j, a in enumerate(args)])
            minus = twin(*[a - step * t if j == i else a for j, a in enumerate(args)])
            expected = ((plus - minus) * cotangent).sum() / (2 * step)
            tolerance = 2e-5 * np.linalg.norm(g) / arg.size**0.5 + 2e-6 * largest
            difference = abs((g * t).sum() - expected)
            assert difference <= tolerance, f"argument {i}: {difference:.3g} over {tolerance:.3g}"


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
