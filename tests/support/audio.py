"""Noise, spectrograms against the twin, and small separations with known tracks and their report pages."""

from __future__ import annotations

import json
import math
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from mlx_xformer.nn.mel import HOP, N_FFT, mel_filters
from mlx_xformer.reference.nn import mel as mel_twin
from mlx_xformer.reference.nn.spectral import stft
from mlx_xformer.separation.report.page import Embedding, write_report


def speech_noise(rows, samples, seed=0):
    """Noise whose spectrum falls, as that of speech does."""
    white = np.random.default_rng(seed).normal(size=(rows, samples))
    brown = np.cumsum(white - white.mean(axis=1, keepdims=True), axis=1)
    return (brown / np.abs(brown).max() * 0.9 + 0.01 * white).astype(np.float32)


def assert_log_mel_like_twin(actual, audio, *, bins=80):
    """Within what the budget d of the Fourier transform means for each bin: a sum E of powers, with weights that add up
    to w, is off by 2 d sqrt(w E) + w d^2 at most, and a quarter of its logarithm by a share of that."""
    truth = mel_twin.log_mel(audio.astype(np.float64), bins=bins, samples=None)
    options = {"n_fft": N_FFT, "hop_length": HOP, "normalized": False}
    z64, z32 = stft(audio.astype(np.float64), **options), stft(audio, **options)
    d = 4 * np.abs(z32 - z64).max() + 1e-6 * np.abs(z64).max()
    w, E = mel_filters(bins).sum(axis=0), 10 ** (4 * truth - 4)
    budget = (2 * d * np.sqrt(w / E) + w * d**2 / E) / (4 * math.log(10)) + 2e-6
    excess = np.abs(np.asarray(actual) - truth) / budget
    assert excess.shape == truth.shape and excess.max() <= 1, f"{excess.max():.2f} budgets"


TINY_RATE = 8000


def write_noise(
    path: Path, samples: int, rate: int = TINY_RATE, *, seed: int = 0, level: float = 0.5, **kind: Any
) -> Path:
    """A stereo recording of noise whose level changes, a stretch of odd length at a time."""
    rng = np.random.default_rng(seed)
    stretch, turn = 30011, 0
    burst = rng.uniform(-level, level, (stretch, 2)).astype(np.float32)
    with soundfile.SoundFile(path, "w", rate, 2, **kind) as file:
        while samples:
            file.write(burst[:samples] * np.float32(1 / (turn % 7 + 1)))
            samples, turn = samples - min(samples, stretch), turn + 1
    return path


RATE = 44100
VOID = {"meta", "link", "input", "br", "img", "hr"}


class Page(HTMLParser):
    """What stands in a page: every tag, the text of scripts by id, the values of <data>, the visible text."""

    def __init__(self, path):
        super().__init__(convert_charrefs=True)
        self.source = Path(path).read_text("utf-8")
        self.tags, self.open, self.texts, self.values = [], [], {}, []
        self.feed(self.source)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "data":
            self.values.append(float(dict(attributes)["value"]))
        if tag not in VOID:
            self.open.append((tag, dict(attributes).get("id")))

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, text):
        if self.open:
            key = self.open[-1] if self.open[-1][0] in ("script", "style") else "text"
            self.texts[key] = self.texts.get(key, "") + text

    def facts(self):
        return json.loads(self.texts["script", "data"])


def tones(seconds, rate=RATE, channels=2, seed=0):
    """A mix and two stems that leave a residual, (channels, samples) each."""
    rng = np.random.default_rng(seed)
    t = np.arange(round(seconds * rate)) / rate
    bass = 0.4 * np.sin(2 * np.pi * 110 * t) * np.array([[1.0], [0.7]][:channels])
    vocals = 0.2 * np.sin(2 * np.pi * 997 * t) * (t > t[-1] / 2) * np.array([[0.5], [1.0]][:channels])
    mix = bass + vocals + 0.003 * rng.standard_normal(bass.shape)
    return mix.astype(np.float32), {"bass": bass.astype(np.float32), "vocals": vocals.astype(np.float32)}


def save_separation(folder, mix, stems, rate=RATE, mix_rate=RATE):
    """The files of a separation: the mix's path and the stems'."""
    paths = {name: folder / f"{number}.wav" for number, name in enumerate(stems)}
    for name, path in paths.items():
        soundfile.write(path, stems[name].T, rate, subtype="FLOAT")
    soundfile.write(folder / "mix.wav", mix.T, mix_rate, subtype="FLOAT")
    return folder / "mix.wav", paths


def make_report(folder, mix, stems, *, title="a song", facts=None, **rates):
    """The page of a separation, and where it is."""
    files = save_separation(folder, mix, stems, **rates)
    write_report(folder / "report.html", *files, title=title, facts=facts or {"Model": "none"})
    return folder / "report.html"


@contextmanager
def embedding(monkeypatch, *values):
    with monkeypatch.context() as patch:
        patch.setattr(Embedding, "choose", staticmethod(lambda *_: Embedding(*values)))
        yield
