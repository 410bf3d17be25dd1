"""write_report(): one self-contained HTML page for a separated track, with waveforms, levels and synchronous players.

The audio is read twice, in sections, so that memory does not grow with the track. The page's layout, style and script
are the files in data/.
"""

from __future__ import annotations

import base64
import hashlib
import html
import itertools
import json
import math
import os
import re
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import IO

import numpy as np
import soxr

from ...audio.encode import encode_mp3
from ...audio.recording import Recording
from ...audio.resampling import convert_channels
from .measure import BANDS, HIGHEST, LOWEST, MARGIN, SECTION, Measure, Tracks

_LONG = 15 * 60  # seconds
_PARTS = ("page.html", "style.css", "script.js")
_HUES = ["drums", "bass", "other", "vocals", "guitar", "piano"]  # the stems of style.css's colours, in order
_CHANNELS = {1: "mono", 2: "stereo"}


@dataclass(frozen=True)
class Embedding:
    """How audio is embedded in the page: as MP3, which every browser plays.

    Args:
        channels: 1 or 2.
        rate: the sample rate in Hz.
        kbps: the bit rate in kbit/s.
    """

    channels: int
    rate: int
    kbps: int

    @staticmethod
    def choose(channels: int, rate: int, seconds: float) -> Embedding:
        """Chooses an embedding that keeps a long track's page about as small as that of fifteen minutes."""
        if seconds <= _LONG:
            return Embedding(min(channels, 2), rate if rate in (32000, 44100, 48000) else 44100, 128)
        return Embedding(1, 44100, 48) if seconds <= 4 * _LONG else Embedding(1, 22050, 32)

    def encode(self, audio: np.ndarray, rate: int) -> str:
        """Encodes audio (C, N) at `rate` as MP3 in base64."""
        audio = soxr.resample(convert_channels(audio, self.channels).T, rate, self.rate).T
        return base64.b64encode(encode_mp3(audio, self.rate, self.kbps)).decode()


def write_report(
    path: str | Path,
    mix: str | Path | Recording,
    stems: Mapping[str, str | Path | Recording],
    *,
    title: str,
    facts: Mapping[str, object],
) -> None:
    """Writes the page of one separated track, completely or not at all. Missing folders are created.

    Args:
        path: the HTML file.
        mix: the recording that was separated. It is converted to the stems' sample rate and channels.
        stems: the file or recording of each stem, all of the same sample rate, channels and length.
        title: of the page.
        facts: how the stems were made (model, version, options), shown unchanged.

    Raises:
        ValueError: if the stems differ, are empty or are not finite.
        OSError: if the page cannot be written.
    """
    path = Path(path)
    tracks = Tracks(Recording.open(mix), {name: Recording.open(stem) for name, stem in stems.items()})
    measures = [Measure(tracks.rate, tracks.channels, tracks.samples) for _ in tracks.names]
    for audio in tracks.read_sections():
        for measure, one in zip(measures, audio, strict=True):
            measure.add(one)
    embedding = Embedding.choose(tracks.channels, tracks.rate, tracks.seconds)
    page = _page(tracks, measures, embedding, title, facts)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    try:
        with open(handle, "w", encoding="utf-8") as out:
            before, after = page.split("<!--audio-->")
            out.write(before)
            _embed(out, tracks, embedding)
            out.write(after)
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _embed(out: IO[str], tracks: Tracks, embedding: Embedding) -> None:
    """Writes the audio, one section of every track at a time."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for number, audio in enumerate(tracks.read_with_margins()):
            for track, text in enumerate(pool.map(lambda one: embedding.encode(one, tracks.rate), audio)):
                out.write(f'<script type="text/plain" id="a{track}-{number}">{text}</script>\n')


def _page(
    tracks: Tracks, measures: list[Measure], embedding: Embedding, title: str, facts: Mapping[str, object]
) -> str:
    """The page, with a comment in place of the audio."""
    template, style, script = (files(__package__).joinpath("data", part).read_text("utf-8") for part in _PARTS)
    scale = max(1e-9, *(m.peak for m in measures))
    hues = ["mix", *_hues(tracks.names[1:-1]), "residual"]
    channels = _CHANNELS.get(tracks.channels, f"{tracks.channels} channels")
    data = {
        "rate": embedding.rate,
        "seconds": tracks.seconds,
        "stretch": SECTION,
        "margin": MARGIN,
        "bands": BANDS,
        "frequencies": [LOWEST, min(HIGHEST, tracks.rate / 2)],
        "tracks": [m.pictures(scale) for m in measures],
    }
    fields = {
        "title": html.escape(title),
        "style": style,
        "script": script,
        "style_hash": _hash(style),
        "script_hash": _hash(script),
        "about": f"{_clock(tracks.seconds)} · {tracks.rate / 1000:g} kHz · {channels}",
        "residual": _decibels(_ratio_db(measures[-1].energy, measures[0].energy), "dB"),
        "tracks": "\n".join(map(_row, hues, tracks.names, measures)),
        "embedding": _describe(embedding, tracks.seconds),
        "facts": "".join(
            f"<div><dt>{html.escape(k)}</dt><dd>{html.escape(str(v))}</dd></div>" for k, v in facts.items()
        ),
        "data": json.dumps(data),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: fields[match[1]], template)


def _describe(embedding: Embedding, seconds: float) -> str:
    """The sentences that say what the players play."""
    kind = _CHANNELS[embedding.channels]
    plays = f"The players hold {kind} MP3 at {embedding.kbps} kbit/s; the files beside this page are the result itself."
    if seconds <= _LONG:
        return plays
    return (
        f"This track is longer than {_LONG // 60} minutes, so its players are reduced to keep the page small. {plays}"
    )


def _ratio_db(part: float, whole: float) -> float:
    """A ratio of energies in decibels: -inf if the part is 0, NaN if the whole is 0."""
    if not whole:
        return math.nan
    return 10 * math.log10(part / whole) if part else -math.inf


def _hues(stems: list[str]) -> list[str]:
    """Colours: a known stem has the same one on every page; the others get the free ones in turn."""
    known = [str(_HUES.index(name)) if name in _HUES else "" for name in stems]
    free = itertools.cycle([str(i) for i in range(len(_HUES)) if str(i) not in known] or ["0"])
    return [hue or next(free) for hue in known]


def _hash(text: str) -> str:
    """The hash of an inline script or style for the content security policy."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _row(hue: str, name: str, measure: Measure) -> str:
    """The section of one track."""
    label = html.escape(name.replace("_", " "))
    return f"""<section class="track" data-hue="{hue}" aria-label="{label}">
<div class="side">
<h2>{label}</h2>
<div class="buttons">
<button type="button" data-act="solo" aria-pressed="false" aria-label="Solo {label}">Solo</button>
<button type="button" data-act="mute" aria-pressed="false" aria-label="Mute {label}">Mute</button>
</div>
<dl class="levels">
<div><dt>Peak</dt><dd>{_decibels(measure.peak_db, "dBFS")}</dd></div>
<div><dt>RMS</dt><dd>{_decibels(measure.rms_db, "dBFS")}</dd></div>
</dl>
{_meter(measure)}
</div>
<div class="view" role="img" aria-label="Waveform and spectrogram of {label}"><canvas class="wave"></canvas>
<div class="spectral"><canvas class="spectrum"></canvas></div></div>
</section>"""


def _meter(measure: Measure) -> str:
    """A bar from -60 to 0 dBFS, filled up to the RMS level, with a mark at the peak."""
    rms, peak = (round(min(max(0.0, 60 + level), 60.0), 2) for level in (measure.rms_db, measure.peak_db))
    return (
        '<svg class="meter" viewBox="0 0 60 2" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect class="rail" width="60" height="2"/><rect class="rms" width="{rms}" height="2"/>'
        f'<rect class="peak" x="{max(peak - 0.6, 0):.2f}" width="0.6" height="2"/></svg>'
    )


def _decibels(value: float, unit: str) -> str:
    """A level as text, and as a number in the value attribute."""
    if math.isnan(value):
        text = "undefined"
    elif math.isinf(value):
        text = f"−∞ {unit}" if value < 0 else f"∞ {unit}"
    else:
        text = f"{value:.1f} {unit}".replace("-", "−")
    return f'<data value="{value:.6g}">{text}</data>'


def _clock(seconds: float) -> str:
    """Formats a time as 1:02:03 or 4:05."""
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"
