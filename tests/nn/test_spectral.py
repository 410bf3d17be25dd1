"""STFT and inverse against the NumPy twin and against direct sums."""

import mlx.core as mx
import numpy as np
import pytest
from support.harness import assert_within_budget, check_forward, check_gradient

from mlx_xformer.nn import spectral
from mlx_xformer.reference.nn import spectral as twin

SIZES = [(16, 4), (20, 5), (24, 8), (32, 16)]


def signal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


@pytest.mark.parametrize("pads", [(0, 0), (3, 5), (10, 2), (12, 11), (17, 30)])
def test_reflect_pad(pads):
    """Also inputs too short to mirror, which are extended with zeros first."""
    x = signal(2, 11)
    assert np.allclose(
        np.array(spectral.reflect_pad(mx.array(x.astype(np.float32)), *pads)), twin.reflect_pad(x, *pads), atol=1e-6
    )
    middle = np.array(spectral.reflect_pad(mx.array(x.astype(np.float32)), *pads))[:, pads[0] : pads[0] + 11]
    assert (middle == x.astype(np.float32)).all()


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize(("n_fft", "hop"), SIZES)
def test_stft(n_fft, hop, normalized, center):
    options = {"n_fft": n_fft, "hop_length": hop, "center": center, "normalized": normalized}
    x = signal(2, 3, 101)
    check_forward(lambda a: spectral.stft(a, **options), lambda a: twin.stft(a, **options), x)


def test_stft_is_the_windowed_sum():
    x, n_fft, hop = signal(50), 16, 4
    z = np.array(spectral.stft(mx.array(x.astype(np.float32)), n_fft=n_fft, hop_length=hop, center=False))
    n = np.arange(n_fft)
    window = np.sin(np.pi * n / n_fft) ** 2
    t, f = 3, 5
    expected = (x[t * hop : t * hop + n_fft] * window * np.exp(-2j * np.pi * f * n / n_fft)).sum() / np.sqrt(n_fft)
    assert abs(z[t, f] - expected) < 1e-6


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize(("n_fft", "hop"), SIZES)
def test_istft(n_fft, hop, normalized):
    options = {"n_fft": n_fft, "hop_length": hop, "normalized": normalized}
    z = signal(2, 9, n_fft // 2 + 1) + 1j * signal(2, 9, n_fft // 2 + 1, seed=1)
    length = 7 * hop
    ref64, ref32 = (twin.istft(a, length=length, **options) for a in (z, z.astype(np.complex64)))
    out = np.array(spectral.istft(mx.array(z.astype(np.complex64)), length=length, **options))
    assert_within_budget(out, ref64, ref32)


@pytest.mark.parametrize(("n_fft", "hop"), SIZES[:2])
def test_round_trip(n_fft, hop):
    x = signal(2, 97).astype(np.float32)
    z = spectral.stft(mx.array(x), n_fft=n_fft, hop_length=hop)
    covered = (z.shape[-2] - 1) * hop
    back = np.array(spectral.istft(z, n_fft=n_fft, hop_length=hop, length=covered))
    assert np.abs(back - x[:, :covered]).max() < 2e-6


def test_gradient():
    """Through the transform, a change of the spectrum and the inverse."""

    def chain(module):
        def call(x):
            z = module.stft(x, n_fft=16, hop_length=4)
            return module.istft(z * z, n_fft=16, hop_length=4, length=40)

        return call

    check_gradient(chain(spectral), chain(twin), signal(2, 45))


def test_errors():
    with pytest.raises(ValueError, match="x must have at least n_fft = 16 samples, got 9"):
        spectral.stft(mx.zeros((9,)), n_fft=16, hop_length=4, center=False)
    z = mx.zeros((5, 9), mx.complex64)
    with pytest.raises(ValueError, match="hop_length must divide n_fft, 16, got 5"):
        spectral.istft(z, n_fft=16, hop_length=5, length=4)
    with pytest.raises(ValueError, match=r"z must have n_fft // 2 \+ 1 = 11 frequencies, got 9"):
        spectral.istft(z, n_fft=20, hop_length=5, length=4)
    with pytest.raises(ValueError, match="length must be at most what 5 frames cover, got 40"):
        spectral.istft(z, n_fft=16, hop_length=4, length=40)
    with pytest.raises(ValueError, match="must cover all 8 samples"):
        spectral.istft(z, n_fft=16, hop_length=16, length=8, center=False)
