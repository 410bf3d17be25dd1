"""STFT and inverse, framed as PyTorch frames them. Axes: T frames, then F frequencies."""

import math

import numpy as np


def reflect_pad(x: np.ndarray, left: int, right: int) -> np.ndarray:
    """Reflect the last axis at both ends, without repeating the end samples.

    An input not longer than the larger padding is first extended with zeros, on the right as far as `right`
    reaches, then on the left, by as much as the reflection lacks. Source: demucs/hdemucs.py, pad1d.
    """
    lacking = max(left, right) + 1 - x.shape[-1]
    if lacking > 0:
        zeros_right = min(right, lacking)
        zeros_left = lacking - zeros_right
        x = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(zeros_left, zeros_right)])
        left, right = left - zeros_left, right - zeros_right
    return np.pad(x, [(0, 0)] * (x.ndim - 1) + [(left, right)], mode="reflect")


def _hann(n_fft: int, dtype: np.dtype) -> np.ndarray:
    """The periodic Hann window, (n_fft,)."""
    return (0.5 - 0.5 * np.cos(2.0 * math.pi * np.arange(n_fft) / n_fft)).astype(dtype)


def stft(x: np.ndarray, *, n_fft: int, hop_length: int, center: bool = True, normalized: bool = True) -> np.ndarray:
    """x (..., samples) real -> (..., T, n_fft // 2 + 1) complex, with a periodic Hann window.

    `center` reflects n_fft // 2 samples at both ends, so frame t is centred on sample t * hop_length.
    `normalized` divides by sqrt(n_fft).
    """
    if center:
        if x.shape[-1] <= n_fft // 2:
            raise ValueError(f"samples must be more than n_fft // 2 = {n_fft // 2}, got {x.shape[-1]}")
        x = reflect_pad(x, n_fft // 2, n_fft // 2)
    if x.shape[-1] < n_fft:
        raise ValueError(f"samples must be at least n_fft = {n_fft}, got {x.shape[-1]}")
    frames = np.lib.stride_tricks.sliding_window_view(x, n_fft, axis=-1)[..., ::hop_length, :]
    z = np.fft.rfft(frames * _hann(n_fft, x.dtype), axis=-1)  # (..., T, F)
    z = z.astype(np.result_type(x.dtype, np.complex64), copy=False)
    return z / math.sqrt(n_fft) if normalized else z


def istft(
    z: np.ndarray, *, n_fft: int, hop_length: int, length: int, center: bool = True, normalized: bool = True
) -> np.ndarray:
    """The inverse by overlap-add, over the summed squares of the window: (..., T, F) -> (..., length)."""
    if z.shape[-1] != n_fft // 2 + 1:
        raise ValueError(f"frequencies must be n_fft // 2 + 1 = {n_fft // 2 + 1}, got {z.shape[-1]}")
    dtype = z.real.dtype
    window = _hann(n_fft, dtype)
    frames = np.fft.irfft(z, n=n_fft, axis=-1).astype(dtype, copy=False) * window  # (..., T, n_fft)
    if normalized:
        frames = frames * math.sqrt(n_fft)

    T = z.shape[-2]
    first = n_fft // 2 if center else 0
    total = max((T - 1) * hop_length + n_fft, first + length)
    x = np.zeros((*z.shape[:-2], total), dtype=dtype)
    weight = np.zeros(total, dtype=dtype)
    for t in range(T):
        place = slice(t * hop_length, t * hop_length + n_fft)
        x[..., place] += frames[..., t, :]
        weight[place] += window * window

    covered = slice(first, min(first + length, (T - 1) * hop_length + n_fft))
    if np.any(weight[covered] < 1e-11):
        raise ValueError(f"the windows must cover every sample, got a gap at hop {hop_length} of {n_fft}")
    x[..., covered] /= weight[covered]
    return x[..., first : first + length]  # zeros after the last frame
