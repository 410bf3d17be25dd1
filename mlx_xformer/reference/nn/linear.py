"""Matrices in a few bits for each number: affine quantization, and layers with such weights.

A code stands for code * scale + bias, where scale and bias belong to a group of neighbouring columns. Source of the
layout: mlx.core.quantize. Axes: I inputs, O outputs, G groups (I / group_size).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

Params = Mapping[str, np.ndarray]


def quantize(x: np.ndarray, bits: int, group: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes like x (..., I) from 0 to 2^bits - 1, and scales and biases (..., G): x is nearly code * scale + bias.

    The end of a group's range that is farther from 0 is met exactly.
    """
    grouped = x.reshape(*x.shape[:-1], -1, group)  # (..., G, group)
    low, high = grouped.min(axis=-1), grouped.max(axis=-1)
    top = 2**bits - 1
    step = np.maximum((high - low) / top, 1e-7)
    farther = np.where(np.abs(low) > np.abs(high), low, high)
    step = np.where(np.abs(low) > np.abs(high), step, -step)
    count = np.round(farther / step)
    scale = np.where(count == 0, step, farther / np.where(count == 0, 1, count))
    bias = np.where(count == 0, 0, farther)
    codes = np.clip(np.round((grouped - bias[..., None]) / scale[..., None]), 0, top)
    return codes.reshape(x.shape).astype(np.uint32), scale, bias


def dequantize(codes: np.ndarray, scales: np.ndarray, biases: np.ndarray) -> np.ndarray:
    """The numbers that codes (..., I) stand for: scales and biases (..., G) -> (..., I)."""
    group = codes.shape[-1] // scales.shape[-1]
    return codes.astype(scales.dtype) * np.repeat(scales, group, axis=-1) + np.repeat(biases, group, axis=-1)


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes (..., I) as a stream of bits in words of 32 (..., I bits / 32), the lowest bit of the first code first."""
    stream = (codes[..., None] >> np.arange(bits)) & 1  # (..., I, bits)
    stream = stream.reshape(*codes.shape[:-1], -1, 32).astype(np.uint64)  # (..., words, 32)
    return (stream << np.arange(32, dtype=np.uint64)).sum(axis=-1).astype(np.uint32)


def unpack(words: np.ndarray, bits: int) -> np.ndarray:
    """The inverse of `pack`."""
    stream = (words[..., None] >> np.arange(32, dtype=np.uint32)) & 1  # (..., words, 32)
    stream = stream.reshape(*words.shape[:-1], -1, bits).astype(np.uint32)  # (..., I, bits)
    return (stream << np.arange(bits, dtype=np.uint32)).sum(axis=-1).astype(np.uint32)


def unpacked_weight(params: Params, bits: int, dtype: np.dtype) -> np.ndarray:
    """The matrix that weight (..., O, words), scales and biases (..., O, G) stand for: (..., O, I)."""
    scales, biases = (params[name].astype(dtype) for name in ("scales", "biases"))
    return dequantize(unpack(params["weight"], bits), scales, biases)


def quantized_linear(params: Params, x: np.ndarray, *, bits: int) -> np.ndarray:
    """x (..., I) by a packed matrix (O, I), with an optional bias (O,) -> (..., O)."""
    y = x @ unpacked_weight(params, bits, x.dtype).T
    return y + params["bias"] if "bias" in params else y
