"""write_report(): one self-contained HTML page for a separated track, with waveforms, levels and synchronous players.

The audio is read once, in sections, so that memory does not grow with the track. The page's layout, style and script
are the files in data/.
"""

from __future__ import annotations

import base64
import itertools
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import soxr

from ...audio.encode import encode_webm
from ...audio.recording import Recording
from ...audio.resampling import convert_channels
from ...storage.replacing import replace_file
from .index import Levels, Song
from .markup import (
    choose_hues,
    decibels,
    describe_audio,
    escape,
    fill_template,
    hash_inline,
    label,
    link,
    meter,
    read_part,
)
from .measure import BANDS, HIGHEST, LOWEST, MARGIN, SECTION, Measure, Tracks

_LONG = 15 * 60  # seconds
_KEPT_RATES = (32000, 44100, 48000)  # Hz
_KEYS = 6  # stems that have a key


@dataclass(frozen=True)
class Embedding:
    """How audio is embedded in the page: as Opus, which every browser plays.

    The samples are stored as if they were at Opus's 48 kHz, which saves the conversion of their sample rate; the
    page's script gives them their own rate back.

    Args:
        channels: 1 or 2.
        rate: the sample rate in Hz.
        kbps: the bit rate in kbit/s at 48 kHz.
    """

    channels: int
    rate: int
    kbps: int

    @staticmethod
    def choose(channels: int, rate: int, seconds: float) -> Embedding:
        """Chooses an embedding that keeps a long track's page about as small as that of fifteen minutes."""
        rate = rate if rate in _KEPT_RATES else 44100
        if seconds <= _LONG:
            return Embedding(min(channels, 2), rate, 96 if channels > 1 else 64)
        return Embedding(1, rate, 32 if seconds <= 4 * _LONG else 20)

    def encode(self, audio: np.ndarray, rate: int) -> bytes:
        """Encodes audio (C, N) at `rate`, in base64."""
        audio = convert_channels(audio, self.channels)
        if rate != self.rate:
            audio = soxr.resample(audio.T, rate, self.rate).T
        return base64.b64encode(encode_webm(audio, self.kbps))


def write_report(
    path: str | Path,
    mix: str | Path | Recording,
    stems: Mapping[str, str | Path | Recording],
    *,
    title: str,
    facts: Mapping[str, object],
    index: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Song:
    """Writes the page of one separated track, completely or not at all. Missing folders are created.

    Args:
        path: the HTML file.
        mix: the recording that was separated. It is converted to the stems' sample rate and channels.
        stems: the file or recording of each stem, all of the same sample rate, channels and length. The page links to
            files.
        title: of the page.
        facts: how the stems were made (model, version, options), shown unchanged.
        index: the page of all songs, to which this one links.
        progress: called with the sections that are done and their number, after each section of 10 seconds.

    Returns:
        What the index says of the song.

    Raises:
        ValueError: if the stems differ, are empty or are not finite.
        OSError: if the page cannot be written.
    """
    path = Path(path)
    tracks = Tracks(Recording.open(mix), {name: Recording.open(stem) for name, stem in stems.items()})
    measures = [Measure(tracks.rate, tracks.channels, tracks.samples) for _ in tracks.names]
    embedding = Embedding.choose(tracks.channels, tracks.rate, tracks.seconds)
    files = {name: Path(stem) for name, stem in stems.items() if not isinstance(stem, Recording)}
    with replace_file(path) as out, tempfile.TemporaryFile(dir=path.parent) as audio:
        _embed(audio, tracks, measures, embedding, progress)
        song = _summarize(path, title, files, tracks, measures)
        page = _page(song, tracks, measures, embedding, facts, index)
        before, after = page.split("<!--audio-->")
        out.write(before.encode())
        audio.seek(0)
        shutil.copyfileobj(audio, out)
        out.write(after.encode())
    return song


def _embed(
    out: IO[bytes],
    tracks: Tracks,
    measures: list[Measure],
    embedding: Embedding,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Measures the tracks, a section of all at a time, and writes their audio.

    That of the mix is left out: the stems and the residual add up to it.
    """

    def handle(track: int, audio: np.ndarray) -> bytes:
        measures[track].add(audio[:, tracks.margin : audio.shape[1] - tracks.margin])
        return embedding.encode(audio, tracks.rate) if track else b""

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for number, audio in enumerate(tracks.read_with_margins()):
            texts = enumerate(pool.map(handle, range(len(audio)), audio))
            for track, text in itertools.islice(texts, 1, None):
                out.write(f'<script type="text/plain" id="a{track}-{number}">'.encode() + text + b"</script>\n")
            if progress is not None:
                progress(number + 1, tracks.sections)


def _summarize(path: Path, title: str, files: Mapping[str, Path], tracks: Tracks, measures: list[Measure]) -> Song:
    levels = [
        Levels(name, files.get(name), measure.peak_db, measure.rms_db)
        for name, measure in zip(tracks.names, measures, strict=True)
    ]
    residual = _ratio_db(measures[-1].energy, measures[0].energy)
    return Song(path, title, tracks.seconds, tracks.rate, tracks.channels, residual, tuple(levels[:-1]))


def _page(
    song: Song,
    tracks: Tracks,
    measures: list[Measure],
    embedding: Embedding,
    facts: Mapping[str, object],
    index: str | Path | None,
) -> str:
    """The page, with a comment in place of the audio."""
    style, script = read_part("base.css") + read_part("page.css"), read_part("page.js")
    scale = max(1e-9, *(m.peak for m in measures))
    hues = ["mix", *choose_hues(tracks.names[1:-1]), "residual"]
    files = [levels.file for levels in song.tracks]
    folder = song.page.parent
    data = {
        "rate": embedding.rate,
        "seconds": tracks.seconds,
        "stretch": SECTION,
        "margin": MARGIN,
        "bands": BANDS,
        "frequencies": [LOWEST, min(HIGHEST, tracks.rate / 2)],
        "tracks": [m.pictures(scale) for m in measures],
    }
    rows = zip(hues, tracks.names, measures, [*files, None], _assign_keys(tracks.names), strict=True)
    fields = {
        "title": escape(song.title),
        "style": style,
        "script": script,
        "style_hash": hash_inline(style),
        "script_hash": hash_inline(script),
        "home": f'<p class="home"><a href="{link(index, folder)}">All songs</a></p>' if index else "",
        "about": describe_audio(tracks.seconds, tracks.rate, tracks.channels),
        "residual": decibels(song.residual_db, "dB"),
        "tracks": "\n".join(_row(*row, folder) for row in rows),
        "embedding": _describe(embedding, tracks.seconds, any(files)),
        "facts": "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in facts.items()),
        "data": json.dumps(data),
    }
    return fill_template(read_part("page.html"), fields)


def _describe(embedding: Embedding, seconds: float, linked: bool) -> str:
    """The sentences that say what the players play."""
    kind = "mono" if embedding.channels == 1 else "stereo"
    plays = f"The players hold {kind} Opus at about {embedding.kbps * embedding.rate / 48000:.0f} kbit/s."
    if linked:
        plays += " The stems themselves are the files linked beside their names, as long as they lie where they were."
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


def _assign_keys(names: list[str]) -> list[str]:
    """The key of each track: 1 to 6 for stems, M for the mix, none for the residual."""
    stems = len(names) - 2
    return ["M", *(str(i + 1) if i < _KEYS else "" for i in range(stems)), ""]


def _row(hue: str, name: str, measure: Measure, file: Path | None, key: str, folder: Path) -> str:
    """The section of one track."""
    text = label(name)
    keys = f' aria-keyshortcuts="{key}"', f' aria-keyshortcuts="Shift+{key}"'
    solo_key, mute_key = keys if key.isdigit() else (keys[0], "") if key else ("", "")
    return f"""<section class="track" data-hue="{hue}" aria-label="{text}">
<div class="side">
<div class="head"><h2>{text}</h2>{f"<kbd>{key}</kbd>" if key else ""}{_file_link(text, file, folder)}</div>
<div class="buttons">
<button type="button" data-act="solo" aria-pressed="false" aria-label="Solo {text}"{solo_key}>Solo</button>
<button type="button" data-act="mute" aria-pressed="false" aria-label="Mute {text}"{mute_key}>Mute</button>
</div>
<div class="fader"><input type="range" data-act="volume" min="-48" max="6" step="1" value="0" \
aria-label="Volume of {text}"><output>0 dB</output></div>
<dl class="levels">
<div><dt>Peak</dt><dd>{decibels(measure.peak_db, "dBFS")}</dd></div>
<div><dt>RMS</dt><dd>{decibels(measure.rms_db, "dBFS")}</dd></div>
</dl>
{meter(measure.rms_db, measure.peak_db)}
</div>
<div class="view" role="img" aria-label="Waveform and spectrogram of {text}"><canvas class="wave"></canvas>
<div class="spectral"><canvas class="spectrum"></canvas></div></div>
</section>"""


def _file_link(text: str, file: Path | None, folder: Path) -> str:
    """A link to the file of a stem, which opens beside the page."""
    if file is None:
        return ""
    kind = escape(file.suffix.removeprefix(".") or "file")
    about = f'aria-label="{kind} file of {text}" title="{escape(file.name)}"'
    return f'<a class="file" href="{link(file, folder)}" download target="_blank" rel="noopener" {about}>{kind}</a>'
