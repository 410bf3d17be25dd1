"""Log-mel spectrograms as Whisper takes them.

Sources: openai/whisper, whisper/audio.py; the mel scale and the weights of M. Slaney, Auditory Toolbox, 1998, as
librosa has them. Axes: N samples, T frames, F mel bins.
"""

from __future__ import annotations

import math
from functools import lru_cache

import mlx.core as mx
import numpy as np

from .spectral import stft

SAMPLE_RATE, N_FFT, HOP = 16000, 400, 160
SAMPLES = 30 * SAMPLE_RATE  # what Whisper hears at a time
_KNEE, _STEP = 1000.0, 200 / 3  # Hz: below it a mel is so many, and from there a factor of 6.4 is 27 of them
_FLOOR, _RANGE = 1e-10, 8.0


def log_mel(audio: mx.array, *, bins: int = 80, samples: int | None = SAMPLES) -> mx.array:
    """audio (..., N) at 16 kHz -> (..., T, bins), a frame for each 160 samples, float32.

    Zeros fill the audio up to `samples` (None: it stays as long as it is). Powers of ten, of which what is more than 80
    dB below the loudest of the recording is raised to that, are brought near -1 to 1. ValueError for audio that is
    empty, longer, or too short to be mirrored at its ends.
    """
    N = audio.shape[-1] if audio.ndim else 0
    if not N:
        raise ValueError(f"audio must hold at least one sample, got shape {audio.shape}")
    if samples is not None and samples < N:
        raise ValueError(f"audio must be at most {samples} samples at {SAMPLE_RATE} Hz, got {N}")
    fill = (N if samples is None else samples) - N
    if N + fill <= N_FFT // 2:  # the ends are mirrored
        raise ValueError(f"audio must be at least {N_FFT // 2 + 1} samples without filling, got {N + fill}")
    x = mx.pad(audio.astype(mx.float32), [(0, 0)] * (audio.ndim - 1) + [(0, fill)])
    spectrum = stft(x, n_fft=N_FFT, hop_length=HOP, normalized=False)[..., :-1, :]  # (..., T, N_FFT // 2 + 1)
    power = mx.square(mx.real(spectrum)) + mx.square(mx.imag(spectrum))
    y = mx.log10(mx.maximum(power @ mx.array(mel_filters(bins).astype(np.float32)), _FLOOR))
    y = mx.maximum(y, mx.max(y, axis=(-2, -1), keepdims=True) - _RANGE)
    return (y + 4) / 4


@lru_cache(maxsize=4)
def mel_filters(bins: int, *, n_fft: int = N_FFT, sample_rate: int = SAMPLE_RATE) -> np.ndarray:
    """Triangular filters of mel frequencies, (n_fft // 2 + 1, bins), float64.

    They reach from 0 Hz to half the sample rate; their corners are equally far apart in mel, and their areas over Hz
    are 1.
    """
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")
    highest = _KNEE / _STEP + math.log(sample_rate / 2 / _KNEE) * 27 / math.log(6.4)
    mels = np.linspace(0, highest, bins + 2)
    corners = np.where(
        mels < _KNEE / _STEP, mels * _STEP, _KNEE * np.exp((mels - _KNEE / _STEP) * math.log(6.4) / 27)
    )  # Hz
    frequencies = np.arange(n_fft // 2 + 1)[:, None] * (sample_rate / n_fft)
    left, top, right = corners[:-2], corners[1:-1], corners[2:]
    rising, falling = (frequencies - left) / (top - left), (right - frequencies) / (right - top)
    return np.maximum(0, np.minimum(rising, falling)) * 2 / (right - left)
