"""Quantization: float samples to integers."""

from __future__ import annotations

from typing import Literal

import numpy as np

Bits = Literal[16, 24, 32]


def quantize(audio: np.ndarray, bits: Bits) -> np.ndarray:
    """Converts float samples to integers as demucs does: clamped to full scale and truncated, without dither.

    Args:
        audio: float samples of any shape, full scale at -1 and 1.
        bits: 16, 24 or 32.

    Returns:
        The same shape: int16 for 16 bits, int32 with the sample in the upper three bytes for 24 bits, and for 32 bits
        the samples as float32, unclamped.
    """
    if bits == 32:
        return audio.astype(np.float32)
    clamped = np.clip(audio.astype(np.float32), -1, 1)
    if bits == 16:
        return (clamped * np.float32(2**15 - 1)).astype(np.int16)
    if bits == 24:
        return (clamped * np.float32(2**23 - 1)).astype(np.int32) << 8
    raise ValueError(f"bits must be 16, 24 or 32, got {bits}")
