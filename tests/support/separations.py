"""Small separations with known tracks, their report pages, and a reader of such pages."""

import json
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import soundfile

from mlx_xformer.separation.report.page import Embedding, write_report

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


def save(folder, mix, stems, rate=RATE, mix_rate=RATE):
    """The files of a separation: the mix's path and the stems'."""
    paths = {name: folder / f"{number}.wav" for number, name in enumerate(stems)}
    for name, path in paths.items():
        soundfile.write(path, stems[name].T, rate, subtype="FLOAT")
    soundfile.write(folder / "mix.wav", mix.T, mix_rate, subtype="FLOAT")
    return folder / "mix.wav", paths


def made(folder, mix, stems, *, title="a song", facts=None, **rates):
    """The page of a separation, and where it is."""
    files = save(folder, mix, stems, **rates)
    write_report(folder / "report.html", *files, title=title, facts=facts or {"Model": "none"})
    return folder / "report.html"


@contextmanager
def embedding(monkeypatch, *values):
    with monkeypatch.context() as patch:
        patch.setattr(Embedding, "choose", staticmethod(lambda *_: Embedding(*values)))
        yield
