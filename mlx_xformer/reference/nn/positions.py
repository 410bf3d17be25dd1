"""Position tables, computed in float64; whoever adds one casts it to the dtype of its input."""

import math
from typing import Any

import numpy as np


def sinusoidal_1d(
    length: int, dim: int, *, shift: int = 0, max_period: float = 10000.0, centered: bool = False
) -> np.ndarray:
    """Cosines, then sines, of the positions shift..shift+length-1, (length, dim) float64.

    `centered` subtracts the mean of the positions. Source: demucs/transformer.py, create_sin_embedding and
    create_sin_embedding_cape at inference.
    """
    if dim % 2 or dim < 4:
        raise ValueError(f"dim must be even and at least 4, got {dim}")
    half = dim // 2
    position = shift + np.arange(length, dtype=np.float64)  # (length,)
    if centered:
        position = position - position.mean()
    exponent = np.arange(half) / (half - 1)  # 0..1: the last period is max_period itself
    phase = position[:, None] / max_period ** exponent[None, :]  # (length, half)
    return np.concatenate([np.cos(phase), np.sin(phase)], axis=-1)


def sinusoidal_2d(height: int, width: int, dim: int, *, max_period: float = 10000.0) -> np.ndarray:
    """Sines and cosines in turn, of the width in the first half of `dim` and of the height in the second.

    (width, height, dim) float64; in HTDemucs the width is time and the height frequency.
    Source: demucs/transformer.py, create_2d_sin_embedding.
    """
    if dim % 4:
        raise ValueError(f"dim must be divisible by 4, got {dim}")
    half = dim // 2
    rate = np.exp(-math.log(max_period) * np.arange(0, half, 2) / half)  # (half / 2,)
    table = np.zeros((width, height, dim))
    for start, count, axis in ((0, width, 0), (half, height, 1)):
        phase = np.arange(count)[:, None] * rate[None, :]  # (count, half / 2)
        phase = np.expand_dims(phase, 1 - axis)  # (width, 1, half / 2) or (1, height, half / 2)
        table[:, :, start : start + half : 2] = np.sin(phase)
        table[:, :, start + 1 : start + half : 2] = np.cos(phase)
    return table


def sinusoidal(length: int, dim: int, *, offset: int = 0, max_period: float = 10000.0) -> np.ndarray:
    """Sine and cosine of each pair of channels in turn (Vaswani et al. 2017), (length, dim) float64."""
    table = np.zeros((length, dim))
    for t in range(length):
        for c in range(dim):
            phase = (offset + t) / max_period ** (2 * (c // 2) / dim)
            table[t, c] = math.cos(phase) if c % 2 else math.sin(phase)
    return table


def positional_encoding(x: np.ndarray, *, offset: int = 0, max_period: float = 10000.0) -> np.ndarray:
    """x (..., L, E) and the sinusoidal positions of its L vectors, from `offset` on (Vaswani et al. 2017)."""
    L, E = x.shape[-2:]
    return x + sinusoidal(L, E, offset=offset, max_period=max_period).astype(x.dtype)


def rotary(
    x: np.ndarray,
    positions: np.ndarray,
    *,
    dims: int,
    theta: float = 10000.0,
    interleaved: bool = False,
    scaling: dict[str, Any] | None = None,
) -> np.ndarray:
    """x (B, H, L, D) with its first `dims` channels turned, pair by pair, by the positions (B, L).

    scaling: the fields of RotaryScaling.
    """
    out = x.copy()
    magnitude = np.asarray(1.0 if scaling is None else scaling.get("magnitude", 1.0), x.dtype)
    for i in range(dims // 2):
        a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + dims // 2)
        rate = theta ** (-2 * i / dims)
        if scaling is not None:
            kept = _kept(rate, i, dims, theta, **scaling)
            rate = kept * rate + (1 - kept) * rate / scaling["factor"]
        phase = (positions.astype(x.dtype) * np.asarray(rate, x.dtype))[:, None, :]  # (B, 1, L)
        cos, sin = magnitude * np.cos(phase), magnitude * np.sin(phase)
        out[..., a] = x[..., a] * cos - x[..., b] * sin
        out[..., b] = x[..., a] * sin + x[..., b] * cos
    return out


def _kept(
    rate: float,
    i: int,
    dims: int,
    theta: float,
    *,
    kind: str,
    length: int | None = None,
    low: float = 1.0,
    high: float = 4.0,
    truncate: bool = True,
    **_: Any,
) -> float:
    """How much of its own rate pair i keeps: 1 for all of it, 0 where it is divided by the factor."""
    if kind == "linear" or length is None:
        return 0.0
    if kind == "llama3":
        wavelength = 2 * math.pi / rate
        if wavelength < length / high:
            return 1.0
        if wavelength > length / low:
            return 0.0
        return (length / wavelength - low) / (high - low)

    def pair_that_turns(times: float) -> float:
        return dims * math.log(length / (times * 2 * math.pi)) / (2 * math.log(theta))

    first, last = pair_that_turns(high), pair_that_turns(low)
    if truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dims - 1)
    if first == last:
        last += 0.001
    return 1 - min(max((i - first) / (last - first), 0.0), 1.0)


def alibi_bias(num_heads: int, L: int, S: int) -> np.ndarray:
    """Minus slope times distance, (H, L, S) float64; slopes fall from head to head by one factor, to 2^-8."""
    power = 1
    while 2 * power <= num_heads:
        power *= 2
    slopes = [2.0 ** (-8 * (h + 1) / power) for h in range(power)]
    slopes += [2.0 ** (-8 * (2 * h + 1) / (2 * power)) for h in range(num_heads - power)]
    bias = np.zeros((num_heads, L, S))
    for h, i, j in np.ndindex(bias.shape):
        bias[h, i, j] = -slopes[h] * abs(S - L + i - j)
    return bias


def relative_buckets(
    L: int, S: int, *, num_buckets: int = 32, max_distance: int = 128, bidirectional: bool = True
) -> np.ndarray:
    """T5's bucket of each query and key, (L, S)."""
    buckets = np.zeros((L, S), dtype=np.int32)
    count = num_buckets // 2 if bidirectional else num_buckets
    for i, j in np.ndindex(L, S):
        ahead = j - (S - L + i)
        distance = abs(ahead) if bidirectional else max(-ahead, 0)
        if distance >= count // 2:
            share = math.log(distance / (count // 2)) / math.log(max_distance / (count // 2))  # of the way to the last
            distance = min(count // 2 + int(share * (count - count // 2)), count - 1)
        buckets[i, j] = distance + (count if bidirectional and ahead > 0 else 0)
    return buckets


def alibi_by_distance(num_heads: int, L: int, S: int) -> np.ndarray:
    """alibi_bias by how far a key is ahead of the query, from -(S - 1) to L - 1: (H, S + L - 1)."""
    return alibi_bias(num_heads, S + L - 1, S + L - 1)[:, S - 1] if S + L > 1 else np.zeros((num_heads, 0))


def buckets_by_distance(L: int, S: int, **options: Any) -> np.ndarray:
    """relative_buckets by how far a key is ahead of the query, from -(S - 1) to L - 1: (S + L - 1,)."""
    return relative_buckets(S + L - 1, S + L - 1, **options)[S - 1]
