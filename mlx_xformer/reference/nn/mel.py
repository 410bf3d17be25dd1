"""Log-mel spectrograms as Whisper takes them. Axes: N samples, T frames, F mel bins."""

import math

import numpy as np

from .spectral import stft


def log_mel(audio: np.ndarray, *, bins: int = 80, samples: int | None = 480000) -> np.ndarray:
    """audio (..., N) at 16 kHz, with zeros up to `samples`, -> (..., T, bins) of 160 samples a frame."""
    if samples is not None:
        audio = np.concatenate([audio, np.zeros((*audio.shape[:-1], samples - audio.shape[-1]), audio.dtype)], axis=-1)
    spectrum = stft(audio, n_fft=400, hop_length=160, normalized=False)[..., :-1, :]  # the last frame is dropped
    power = np.abs(spectrum) ** 2  # (..., T, 201)
    energy = power @ mel_filters(bins).astype(audio.dtype)
    y = np.log10(np.maximum(energy, np.asarray(1e-10, audio.dtype)))
    y = np.maximum(y, y.max(axis=(-2, -1), keepdims=True) - 8)
    return (y + 4) / 4


def hz_to_mel(hz: float) -> float:
    """Slaney's scale: linear up to 1000 Hz, which is 15 mel, then logarithmic."""
    return 3 * hz / 200 if hz < 1000 else 15 + 27 * math.log(hz / 1000) / math.log(6.4)


def mel_to_hz(mel: float) -> float:
    """The inverse."""
    return 200 * mel / 3 if mel < 15 else 1000 * 6.4 ** ((mel - 15) / 27)


def mel_filters(bins: int, *, n_fft: int = 400, sample_rate: int = 16000) -> np.ndarray:
    """(n_fft // 2 + 1, bins): a triangle of area 1 for each bin."""
    highest = hz_to_mel(sample_rate / 2)
    corners = [mel_to_hz(highest * i / (bins + 1)) for i in range(bins + 2)]
    weights = np.zeros((n_fft // 2 + 1, bins))
    for f in range(n_fft // 2 + 1):
        hz = f * sample_rate / n_fft
        for m in range(bins):
            left, top, right = corners[m : m + 3]
            if left < hz < right:
                height = 2 / (right - left)
                weights[f, m] = height * ((hz - left) / (top - left) if hz <= top else (right - hz) / (right - top))
    return weights
