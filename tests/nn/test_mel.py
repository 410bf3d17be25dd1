"""Log-mel spectrograms: against the twin, and what the filters are."""

import math

import mlx.core as mx
import numpy as np
import pytest
from support.audio import assert_log_mel_like_twin as assert_like_the_twin
from support.audio import speech_noise as noise

from mlx_xformer.nn.mel import N_FFT, SAMPLE_RATE, SAMPLES, log_mel, mel_filters
from mlx_xformer.reference.nn import mel as twin


def test_spectrogram():
    audio = noise(2, 16001)
    assert_like_the_twin(log_mel(mx.array(audio), samples=None), audio)
    assert_like_the_twin(log_mel(mx.array(audio[0]), bins=128, samples=None), audio[0], bins=128)


def test_zeros_fill_a_window():
    audio = noise(1, 4999)[0]
    made = log_mel(mx.array(audio))
    assert made.shape == (3000, 80) and made.dtype == mx.float32
    assert (np.array(made) == np.array(log_mel(mx.array(np.pad(audio, (0, SAMPLES - 4999))), samples=None))).all()
    assert np.ptp(np.array(made)[40:]) == 0 and np.array(made)[40, 0] == pytest.approx(
        np.array(made).max() - 2, abs=1e-6
    )


def test_rows_do_not_see_one_another():
    """What is raised depends on the loudest of the same recording only; a factor of 10 is 2 / 4 of a step each."""
    audio = noise(2, 3203)
    audio[1] *= 100
    together = np.array(log_mel(mx.array(audio), samples=None))
    for row in range(2):
        alone = np.array(log_mel(mx.array(audio[row]), samples=None))
        assert np.abs(together[row] - alone).max() < 1e-5
        assert np.abs(np.array(log_mel(mx.array(audio[row] * 10), samples=None)) - alone - 0.5).max() < 1e-4


def test_a_tone_is_where_it_belongs():
    """1000 Hz are 15 mel, and bins are as far apart in mel."""
    for hertz in (250, 1000, 3000):
        tone = np.sin(2 * np.pi * hertz / SAMPLE_RATE * np.arange(8000)).astype(np.float32)
        mel = 3 * hertz / 200 if hertz < 1000 else 15 + 27 * math.log(hertz / 1000) / math.log(6.4)
        highest = 15 + 27 * math.log(8) / math.log(6.4)
        found = int(np.array(log_mel(mx.array(tone), samples=None))[25].argmax())
        assert abs(found + 1 - 81 * mel / highest) < 0.75


def test_silence():
    assert (np.array(log_mel(mx.zeros((2, 700)), samples=None)) == np.float32(-1.5)).all()


@pytest.mark.parametrize("bins", [1, 7, 80, 128])
def test_filters(bins):
    ours, theirs = mel_filters(bins), twin.mel_filters(bins)
    assert ours.shape == (201, bins) and np.abs(ours - theirs).max() < 1e-12 * theirs.max()
    wide = (ours > 0).sum(axis=0) > 12
    assert np.abs(ours.sum(axis=0)[wide] * SAMPLE_RATE / N_FFT - 1).max(initial=0) < 0.02
    assert wide.sum() == {1: 1, 7: 7, 80: 6, 128: 0}[bins]


@pytest.mark.parametrize(
    ("audio", "options", "message"),
    [
        (mx.zeros((0,)), {}, r"audio must hold at least one sample, got shape \(0,\)"),
        (mx.zeros((2, 0)), {"samples": None}, r"audio must hold at least one sample, got shape \(2, 0\)"),
        (mx.array(1.0), {}, r"audio must hold at least one sample, got shape \(\)"),
        (mx.zeros((SAMPLES + 1,)), {}, "audio must be at most 480000 samples at 16000 Hz, got 480001"),
        (mx.zeros((100,)), {"bins": 0}, "bins must be at least 1, got 0"),
        (mx.zeros((100,)), {"samples": None}, "audio must be at least 201 samples without filling, got 100"),
    ],
)
def test_what_is_refused(audio, options, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        log_mel(audio, **options)
