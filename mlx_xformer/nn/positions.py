"""Position embeddings. The tables are computed in float64 on the host, once per shape, and handed out as float32.

Axes: B batch, H heads, L queries, S keys, D head_dim.
"""

from __future__ import annotations

import math
from functools import lru_cache

import mlx.core as mx
import numpy as np


def sinusoidal_1d(
    length: int, dim: int, *, shift: int = 0, max_period: float = 10000.0, centered: bool = False
) -> mx.array:
    """(length, dim) table [cos | sin] with frequencies max_period^(-i / (dim/2 - 1)), i = 0 .. dim/2 - 1.

    The positions are shift, shift + 1, ...; `centered` subtracts their mean (CAPE at inference).
    Source: demucs/transformer.py, create_sin_embedding. ValueError unless dim is even and at least 4.
    """
    if dim < 4 or dim % 2:
        raise ValueError(f"dim must be even and at least 4, got {dim}")
    return mx.array(_table_1d(length, dim, shift, float(max_period), centered))


@lru_cache(maxsize=16)
def _table_1d(length: int, dim: int, shift: int, max_period: float, centered: bool) -> np.ndarray:
    positions = shift + np.arange(length, dtype=np.float64)[:, None]
    if centered:
        positions = positions - positions.mean()
    half = dim // 2
    phase = positions / max_period ** (np.arange(half) / (half - 1))
    return np.concatenate([np.cos(phase), np.sin(phase)], axis=-1).astype(np.float32)


def sinusoidal_2d(height: int, width: int, dim: int, *, max_period: float = 10000.0) -> mx.array:
    """(width, height, dim) table: channels interleave sin and cos, the first half encodes the position along the
    width (time), the second half along the height (frequency).

    Source: demucs/transformer.py, create_2d_sin_embedding. ValueError unless dim is a multiple of 4.
    """
    if dim < 4 or dim % 4:
        raise ValueError(f"dim must be a multiple of 4, got {dim}")
    return mx.array(_table_2d(height, width, dim, float(max_period)))


@lru_cache(maxsize=16)
def _table_2d(height: int, width: int, dim: int, max_period: float) -> np.ndarray:
    half = dim // 2
    rates = np.exp(np.arange(0, half, 2) * (-math.log(max_period) / half))

    def interleaved(length: int) -> np.ndarray:
        phase = np.arange(length, dtype=np.float64)[:, None] * rates
        return np.stack([np.sin(phase), np.cos(phase)], axis=-1).reshape(length, half)

    table = np.empty((width, height, dim), np.float32)
    table[..., :half] = interleaved(width)[:, None]
    table[..., half:] = interleaved(height)[None]
    return table


def sinusoidal(length: int, dim: int, *, offset: int = 0, max_period: float = 10000.0) -> mx.array:
    """(length, dim) table of Vaswani et al. 2017: channel 2i is sin(p / max_period^(2i / dim)), 2i + 1 the cosine, for
    the positions p = offset, offset + 1, ... Any dim of 1 or more."""
    if dim < 1:
        raise ValueError(f"dim must be at least 1, got {dim}")
    first = offset // _STRETCH * _STRETCH
    stop = -(-(offset + length) // _STRETCH) * _STRETCH
    return mx.array(_table(stop - first, dim, first, float(max_period))[offset - first :][:length])


_STRETCH = 256  # positions that are computed at once, since generation asks for them one by one


@lru_cache(maxsize=16)
def _table(length: int, dim: int, offset: int, max_period: float) -> np.ndarray:
    channel = np.arange(dim)
    phase = (offset + np.arange(length, dtype=np.float64))[:, None] * max_period ** (-(channel // 2 * 2) / dim)
    return np.where(channel % 2, np.cos(phase), np.sin(phase)).astype(np.float32)


def alibi_slopes(num_heads: int) -> np.ndarray:
    """(num_heads,) slopes of ALiBi (Press et al. 2022, arXiv 2108.12409): 2^(-8 h / H), h = 1 .. H, for a power of two;
    else those of the power below, and every second one of the power above."""
    if num_heads < 1:
        raise ValueError(f"num_heads must be at least 1, got {num_heads}")
    power = 2 ** int(math.log2(num_heads))
    slopes = 2.0 ** (-8 * np.arange(1, power + 1) / power)
    more = 2.0 ** (-8 * np.arange(1, 2 * power + 1, 2) / (2 * power))
    return np.concatenate([slopes, more[: num_heads - power]])


def alibi_bias(num_heads: int, L: int, S: int) -> mx.array:
    """(H, L, S) bias: minus the slope of a head times the distance of a key; the queries are the last L of S."""
    distance = mx.abs(mx.arange(L)[:, None] + (S - L) - mx.arange(S)[None])
    return -mx.array(alibi_slopes(num_heads), mx.float32)[:, None, None] * distance


def alibi_by_distance(num_heads: int, L: int, S: int) -> mx.array:
    """(H, S + L - 1): alibi_bias by how far a key is ahead of the query, from -(S - 1) to L - 1."""
    return -mx.array(alibi_slopes(num_heads), mx.float32)[:, None] * mx.abs(mx.arange(1 - S, L))


def relative_buckets(
    L: int, S: int, *, num_buckets: int = 32, max_distance: int = 128, bidirectional: bool = True
) -> mx.array:
    """(L, S) numbers of T5's relative-position buckets (Raffel et al. 2020, arXiv 1910.10683): the near distances one
    each, the far ones in logarithmic steps up to max_distance; keys after the query have the upper half if
    `bidirectional`, and share bucket 0 if not. The queries are the last L of the S positions."""
    _check_buckets(num_buckets, max_distance, bidirectional)
    ahead = np.arange(S)[None] - (np.arange(L)[:, None] + S - L)  # of the query, where positive
    return mx.array(_buckets(ahead, num_buckets, max_distance, bidirectional))


def buckets_by_distance(
    L: int, S: int, *, num_buckets: int = 32, max_distance: int = 128, bidirectional: bool = True
) -> mx.array:
    """(S + L - 1,): relative_buckets by how far a key is ahead of the query, from -(S - 1) to L - 1."""
    _check_buckets(num_buckets, max_distance, bidirectional)
    return mx.array(_buckets(np.arange(1 - S, L), num_buckets, max_distance, bidirectional))


def _check_buckets(num_buckets: int, max_distance: int, bidirectional: bool) -> None:
    least = 4 if bidirectional else 2
    if num_buckets < least or num_buckets % (2 if bidirectional else 1):
        raise ValueError(f"num_buckets must be at least {least}, and even if bidirectional, got {num_buckets}")
    exact = num_buckets // (4 if bidirectional else 2)
    if max_distance <= exact:
        raise ValueError(f"max_distance must be above {exact}, got {max_distance}")


def _buckets(ahead: np.ndarray, num_buckets: int, max_distance: int, bidirectional: bool) -> np.ndarray:
    count = num_buckets // 2 if bidirectional else num_buckets
    base = np.where(ahead > 0, count, 0) if bidirectional else 0
    distance = np.abs(ahead) if bidirectional else np.maximum(-ahead, 0)
    exact = count // 2
    steps = np.log(np.maximum(distance, 1) / exact) / math.log(max_distance / exact) * (count - exact)
    far = np.minimum(exact + steps.astype(np.int64), count - 1)
    return (base + np.where(distance < exact, distance, far)).astype(np.int32)
