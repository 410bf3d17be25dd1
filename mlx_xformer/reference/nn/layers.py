"""Layers as functions of (params, x), channels last. Axes: B batch, T time, F frequencies, C channels."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from ..backend import mean_var

Params = Mapping[str, np.ndarray]
Activation = Callable[[np.ndarray], np.ndarray]


def sub(params: Params, prefix: str) -> dict[str, np.ndarray]:
    """The entries under `prefix.`, with it removed."""
    start = prefix + "."
    return {name[len(start) :]: value for name, value in params.items() if name.startswith(start)}


def _add_bias(params: Params, y: np.ndarray) -> np.ndarray:
    return y + params["bias"] if "bias" in params else y


def linear(params: Params, x: np.ndarray) -> np.ndarray:
    """x (..., Cin), weight (O, Cin), optional bias (O) -> (..., O)."""
    return _add_bias(params, x @ params["weight"].T)


def layer_norm(params: Params, x: np.ndarray, eps: float = 1e-5) -> np.ndarray:
    """Each (..., C) vector to mean 0 and variance 1, then weight (C) and bias (C)."""
    mean, var = mean_var(x, (-1,))
    return (x - mean) / np.sqrt(var + eps) * params["weight"] + params["bias"]


def rms_norm(params: Params, x: np.ndarray, eps: float = 1e-5, plus_one: bool = False) -> np.ndarray:
    """Each (..., C) vector to a mean square of 1, then weight (C), or 1 + weight."""
    weight = params["weight"].astype(x.dtype)
    square = np.mean(np.square(x), axis=-1, keepdims=True)
    return x / np.sqrt(square + np.asarray(eps, x.dtype)) * (1 + weight if plus_one else weight)


def whole_rms_norm(params: Params, x: np.ndarray, eps: float = 1e-5) -> np.ndarray:
    """RMS norm of the heads of each token as one vector: x (B, H, L, D), weight (H D)."""
    B, H, L, D = x.shape
    tokens = x.transpose(0, 2, 1, 3).reshape(B, L, H * D)
    return rms_norm(params, tokens, eps).reshape(B, L, H, D).transpose(0, 2, 1, 3)


def group_norm(
    params: Params, x: np.ndarray, *, num_groups: int, axes: Sequence[int] | None = None, eps: float = 1e-5
) -> np.ndarray:
    """GroupNorm with channels last: statistics over `axes` and the channels of one group together.

    x (B, ..., C). `axes` are counted from the front; by default every axis but the first and the last.
    """
    *lead, C = x.shape
    if C % num_groups:
        raise ValueError(f"channels must be divisible by num_groups, got {C} and {num_groups}")
    axes = tuple(range(1, x.ndim - 1)) if axes is None else tuple(axes)
    grouped = x.reshape(*lead, num_groups, C // num_groups)  # (B, ..., G, C / G)
    mean, var = mean_var(grouped, (*axes, -1))
    normed = (grouped - mean) / np.sqrt(var + eps)
    return normed.reshape(x.shape) * params["weight"] + params["bias"]


def layer_scale(params: Params, x: np.ndarray) -> np.ndarray:
    """One learned factor per channel: x (..., C), scale (C)."""
    return x * params["scale"]


def feed_forward(params: Params, x: np.ndarray, *, activation: Activation) -> np.ndarray:
    """linear1, activation, linear2."""
    return linear(sub(params, "linear2"), activation(linear(sub(params, "linear1"), x)))


def gated_feed_forward(params: Params, x: np.ndarray, *, activation: Activation) -> np.ndarray:
    """down_proj of activation(gate_proj) times up_proj."""
    return linear(
        sub(params, "down_proj"), activation(linear(sub(params, "gate_proj"), x)) * linear(sub(params, "up_proj"), x)
    )


def conv1d(params: Params, x: np.ndarray, *, stride: int = 1, padding: int = 0, dilation: int = 1) -> np.ndarray:
    """Cross-correlation over T with zero padding: x (B, T, Cin), weight (O, K, Cin) -> (B, T', O)."""
    weight = params["weight"]
    B, T, _ = x.shape
    O, K, _ = weight.shape
    span = dilation * (K - 1) + 1
    if T + 2 * padding < span:
        raise ValueError(f"the padded input must hold one kernel of {span}, got {T + 2 * padding}")
    out_length = (T + 2 * padding - span) // stride + 1
    x = np.pad(x, ((0, 0), (padding, padding), (0, 0)))
    y = np.zeros((B, out_length, O), dtype=x.dtype)
    for k in range(K):
        first = k * dilation
        y += x[:, first : first + (out_length - 1) * stride + 1 : stride] @ weight[:, k].T
    return _add_bias(params, y)


def conv2d(params: Params, x: np.ndarray, *, padding: int) -> np.ndarray:
    """Cross-correlation over T and F: x (B, T, F, Cin), weight (O, kT, kF, Cin) -> (B, T', F', O)."""
    weight = params["weight"]
    O, kT, kF, _ = weight.shape
    x = np.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    T, F = x.shape[1] - kT + 1, x.shape[2] - kF + 1
    y = np.zeros((x.shape[0], T, F, O), dtype=x.dtype)
    for i in range(kT):
        for j in range(kF):
            y += x[:, i : i + T, j : j + F] @ weight[:, i, j].T
    return _add_bias(params, y)


def conv_transpose1d(params: Params, x: np.ndarray, *, stride: int) -> np.ndarray:
    """The transpose of a strided conv1d: x (B, T, Cin), weight (O, K, Cin) -> (B, (T - 1) stride + K, O)."""
    weight = params["weight"]
    B, T, _ = x.shape
    O, K, _ = weight.shape
    y = np.zeros((B, (T - 1) * stride + K, O), dtype=x.dtype)
    for k in range(K):
        y[:, k : k + (T - 1) * stride + 1 : stride] += x @ weight[:, k].T
    return _add_bias(params, y)
