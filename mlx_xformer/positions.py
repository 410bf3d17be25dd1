"""Position embeddings. The tables are computed in float64 on the host, once per shape, and handed out as float32.

Axes: T time frames, F frequencies, E embed_dim.
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
