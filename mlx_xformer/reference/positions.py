"""Position tables, computed in float64; whoever adds one casts it to the dtype of its input."""

import math

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
