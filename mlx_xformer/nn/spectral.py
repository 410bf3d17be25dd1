"""Short-time Fourier transform and its inverse, framed as PyTorch frames them, but with frames before frequencies.

Axes: N samples, T frames, F = n_fft // 2 + 1 frequencies. The window is a periodic Hann window of n_fft samples.
Windows are computed in float64 on the host.
"""

from __future__ import annotations

import math
from functools import lru_cache

import mlx.core as mx
import numpy as np

from ..backend.fused import overlap_add


def hann_window(length: int) -> mx.array:
    """(length,) periodic Hann window, float32."""
    return mx.array(_hann(length).astype(np.float32))


@lru_cache(maxsize=8)
def _hann(length: int) -> np.ndarray:
    return 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(length) / length)


def reflect_pad(x: mx.array, left: int, right: int) -> mx.array:
    """(..., N) -> (..., left + N + right), mirrored about the first and the last sample.

    An input too short to mirror is first extended with zeros, to the right and then to the left, as far as needed
    (demucs/hdemucs.py, pad1d).
    """
    length = x.shape[-1]
    missing = max(left, right) + 1 - length
    if missing > 0:
        zeros_right = min(right, missing)
        zeros_left = missing - zeros_right
        x = mx.pad(x, [(0, 0)] * (x.ndim - 1) + [(zeros_left, zeros_right)])
        left, right, length = left - zeros_left, right - zeros_right, x.shape[-1]
    head = x[..., 1 : left + 1][..., ::-1]
    tail = x[..., length - 1 - right : length - 1][..., ::-1]
    return mx.concatenate([head, x, tail], axis=-1)


def stft(x: mx.array, *, n_fft: int, hop_length: int, center: bool = True, normalized: bool = True) -> mx.array:
    """(..., N) -> complex (..., T, F), as torch.stft with pad_mode="reflect".

    `normalized` scales by n_fft^-0.5; `center` puts frame t around sample t * hop_length.
    """
    if center:
        x = reflect_pad(x, n_fft // 2, n_fft // 2)
    if x.shape[-1] < n_fft:
        raise ValueError(f"x must have at least n_fft = {n_fft} samples, got {x.shape[-1]}")
    frames = (x.shape[-1] - n_fft) // hop_length + 1
    x = mx.contiguous(x)
    rows = math.prod(x.shape[:-1])
    framed = mx.as_strided(x, (rows, frames, n_fft), (x.shape[-1], hop_length, 1))
    window = hann_window(n_fft)
    z = mx.fft.rfft(framed * (window * n_fft**-0.5 if normalized else window), axis=-1)
    return z.reshape(*x.shape[:-1], frames, n_fft // 2 + 1)


def istft(
    z: mx.array, *, n_fft: int, hop_length: int, length: int, center: bool = True, normalized: bool = True
) -> mx.array:
    """complex (..., T, F) -> (..., length), as torch.istft: overlap-add divided by the summed squared windows.

    ValueError unless hop_length divides n_fft and the frames cover `length` samples.
    """
    if n_fft % hop_length:
        raise ValueError(f"hop_length must divide n_fft, {n_fft}, got {hop_length}")
    if z.shape[-1] != n_fft // 2 + 1:
        raise ValueError(f"z must have n_fft // 2 + 1 = {n_fft // 2 + 1} frequencies, got {z.shape[-1]}")
    frames = z.shape[-2]
    start = n_fft // 2 if center else 0
    if start + length > (frames - 1) * hop_length + n_fft:
        raise ValueError(f"length must be at most what {frames} frames cover, got {length}")
    window = hann_window(n_fft)
    # A real signal has no imaginary part at 0 and at the highest frequency: other backends ignore it, cuFFT does not.
    ends = [mx.real(z[..., side]).astype(z.dtype) for side in (slice(0, 1), slice(n_fft // 2, None))]
    z = mx.concatenate([ends[0], z[..., 1 : n_fft // 2], ends[1]], axis=-1)
    framed = mx.fft.irfft(z, n=n_fft, axis=-1) * (window * n_fft**0.5 if normalized else window)
    pieces = mx.unflatten(framed, -1, (n_fft // hop_length, hop_length)).swapaxes(-3, -2)
    x = mx.flatten(overlap_add(pieces), -2, -1)[..., start : start + length]
    return x * mx.array(_inverse_envelope(n_fft, hop_length, frames, start, length))


@lru_cache(maxsize=8)
def _inverse_envelope(n_fft: int, hop_length: int, frames: int, start: int, length: int) -> np.ndarray:
    envelope = np.zeros((frames - 1) * hop_length + n_fft)
    squared = _hann(n_fft) ** 2
    for t in range(frames):
        envelope[t * hop_length : t * hop_length + n_fft] += squared
    envelope = envelope[start : start + length]
    if length and envelope.min() < 1e-11:
        raise ValueError(f"the windows of {frames} frames must cover all {length} samples; some have weight 0")
    return (1 / envelope).astype(np.float32)
