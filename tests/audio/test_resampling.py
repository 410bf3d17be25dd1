"""Sample rates, channels and block sizes."""

import numpy as np
import pytest

from mlx_xformer.audio import resampling


def noise(channels=2, samples=1000, seed=0, peak=0.9):
    x = np.random.default_rng(seed).uniform(-peak, peak, (channels, samples))
    return x.astype(np.float32)


def test_channels():
    x = noise(4)
    assert resampling.convert_channels(x, 4) is x
    assert (resampling.convert_channels(x, 2) == x[:2]).all()
    assert np.allclose(resampling.convert_channels(x, 1), x.mean(0, keepdims=True))
    assert (resampling.convert_channels(x[:1], 3) == np.concatenate([x[:1]] * 3)).all()
    with pytest.raises(ValueError, match="audio must be mono or have at least 3 channels, got 2"):
        resampling.convert_channels(x[:2], 3)


def test_resampling_keeps_a_tone():
    t48, t44 = np.arange(48000) / 48000, np.arange(44100) / 44100
    tone = np.sin(2 * np.pi * 997 * t48)[None].astype(np.float32)
    out = resampling.resample(tone, 48000, 44100)
    assert out.shape == (1, 44100)
    assert np.abs(out[0, 2000:-2000] - np.sin(2 * np.pi * 997 * t44)[2000:-2000]).max() < 1e-4
    assert resampling.resample(tone, 48000, 48000) is tone
    for rate in (0, -1, 10**9, 44100.5, float("nan"), "44100"):
        with pytest.raises(ValueError, match=r"to_rate must be a whole number of Hz from 1 to 10000000, got "):
            resampling.resample(tone, 48000, rate)


def test_rechunk():
    x = noise(1, 1000)
    for sizes in ([1000], [1] * 1000, [0, 7, 500, 0, 493], [333, 333, 334]):
        parts = np.split(x, np.cumsum(sizes)[:-1], axis=1)
        out = list(resampling.rechunk(parts, 97))
        assert [p.shape[1] for p in out] == [97] * 10 + [30] and (np.concatenate(out, axis=1) == x).all()
