"""Pieces of HTML that the report page and the index share."""

from __future__ import annotations

import base64
import hashlib
import html
import itertools
import math
import os
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from urllib.parse import quote

_HUES = ["drums", "bass", "other", "vocals", "guitar", "piano"]  # the stems of base.css's colours, in order
_CHANNELS = {1: "mono", 2: "stereo"}


def read_part(name: str) -> str:
    """Reads a file of data/."""
    return files(__package__).joinpath("data", name).read_text("utf-8")


def fill_template(template: str, fields: Mapping[str, str]) -> str:
    """Replaces each {{name}} of a template. What is put in is not searched again."""
    return re.sub(r"\{\{(\w+)\}\}", lambda match: fields[match[1]], template)


def hash_inline(text: str) -> str:
    """The hash of an inline script or style for the content security policy."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def escape(text: object) -> str:
    """Text for HTML and its attributes; the bytes of a file name that are not UTF-8 become replacement characters."""
    return html.escape(str(text).encode("utf-8", "surrogateescape").decode("utf-8", "replace"))


def link(file: str | Path, folder: str | Path) -> str:
    """The relative address of a file from a page in `folder`: it holds wherever both are moved together."""
    relative = os.path.relpath(file, folder).replace(os.sep, "/")
    return quote(os.fsencode(relative))


def choose_hues(stems: Sequence[str]) -> list[str]:
    """Colours: a known stem has the same one on every page; the others get the free ones in turn."""
    known = [str(_HUES.index(name)) if name in _HUES else "" for name in stems]
    free = itertools.cycle([str(i) for i in range(len(_HUES)) if str(i) not in known] or ["0"])
    return [hue or next(free) for hue in known]


def label(name: str) -> str:
    """The name of a track, to be read."""
    return escape(name.replace("_", " "))


def describe_audio(seconds: float, rate: int, channels: int) -> str:
    """Formats the length and kind of audio as 4:05 · 44.1 kHz · stereo."""
    return f"{clock(seconds)} · {rate / 1000:g} kHz · {_CHANNELS.get(channels, f'{channels} channels')}"


def clock(seconds: float) -> str:
    """Formats a time as 1:02:03 or 4:05."""
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


def decibels(value: float, unit: str = "") -> str:
    """A level as text, and as a number in the value attribute."""
    figure = "−∞" if value == -math.inf else "∞" if value == math.inf else f"{value:.1f}".replace("-", "−")
    text = "undefined" if math.isnan(value) else f"{figure} {unit}".strip()
    return f'<data value="{value:.6g}">{text}</data>'


def meter(rms_db: float, peak_db: float) -> str:
    """A bar from -60 to 0 dBFS, filled up to the RMS level, with a mark at the peak."""
    rms, peak = (round(min(max(0.0, 60 + level), 60.0), 2) for level in (rms_db, peak_db))
    return (
        '<svg class="meter" viewBox="0 0 60 2" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect class="rail" width="60" height="2"/><rect class="rms" width="{rms}" height="2"/>'
        f'<rect class="peak" x="{max(peak - 0.6, 0):.2f}" width="0.6" height="2"/></svg>'
    )
