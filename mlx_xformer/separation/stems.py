"""The files of a track's stems: names, gains against clipping, and all files put in place together.

Axes: C channels, n samples of a block.
"""

from __future__ import annotations

import os
import re
import tempfile
import unicodedata
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import IO, Literal

import numpy as np

from ..audio.encode import Bits, Encoding, Format
from ..audio.files import AudioFile, defer_interrupt, prepare_target
from ..audio.recording import BLOCK
from ..audio.tags import Tags

Clip = Literal["rescale", "joint", "clamp", "none"]
_FIELDS = ("track", "trackext", "stem", "ext", "folder", "artist", "album", "title", "number")
_MAX_TAG = 120  # bytes of a tag in a name; a name may have 255


@dataclass(frozen=True)
class Output:
    """How stems become files.

    Args:
        format: "wav", "flac" or "mp3".
        bits: per sample of wav (16, 24, or 32 for floats) and flac (16 or 24).
        mp3_bitrate: in kbit/s; by default the highest at the sample rate.
        clip: what keeps samples within full scale. "rescale" divides each stem whose peak times 1.01 exceeds 1 by that
            product; "joint" divides all stems by the largest such product, so that they still add up to the mix;
            "clamp" limits samples to -0.99 and 0.99; "none" leaves them.
        rate: "model" for the model's sample rate, "keep" for the recording's own.
        filename: a pattern of {track}, {trackext}, {stem}, {ext}, {folder}, {artist}, {album}, {title} and {number},
            below the output folder. {folder} is the recording's folder below the one that was searched, so that a tree
            of recordings keeps its shape. The last four are the recording's tags: "unknown" if it has none, except that
            {number}, which has at least two digits, is empty.

    Raises:
        ValueError: if a field is out of range.
    """

    format: Format = "wav"
    bits: Bits = 16
    mp3_bitrate: int | None = None
    clip: Clip = "rescale"
    rate: Literal["model", "keep"] = "model"
    filename: str = "{folder}/{track}/{stem}.{ext}"

    def __post_init__(self) -> None:
        _ = self.encoding  # checks its fields
        if self.clip not in ("rescale", "joint", "clamp", "none"):
            raise ValueError(f"clip must be one of rescale, joint, clamp, none, got {self.clip!r}")
        if self.rate not in ("model", "keep"):
            raise ValueError(f'rate must be "model" or "keep", got {self.rate!r}')
        try:
            fields = {name for _, name, _, _ in Formatter().parse(self.filename) if name is not None}
        except ValueError:
            fields = {"?"}
        if not fields <= set(_FIELDS) or "stem" not in fields:
            must = f"hold {{stem}} and only {{{'}, {'.join(_FIELDS)}}}"
            raise ValueError(f"filename must {must}, got {self.filename!r}")
        name = self.filename.format(**dict.fromkeys(_FIELDS, "a"))
        if Path(name).is_absolute() or ".." in Path(name).parts or name.endswith(("/", os.sep)):
            raise ValueError(f"filename must name files below the output folder, got {self.filename!r}")

    @property
    def encoding(self) -> Encoding:
        """How samples are stored in the files."""
        return Encoding(self.format, self.bits, self.mp3_bitrate)

    def path(
        self,
        folder: Path,
        recording: Path,
        stem: str,
        ext: str | None = None,
        *,
        below: str = "",
        tags: Tags | None = None,
    ) -> Path:
        """Returns the file of a recording's stem.

        Args:
            folder: the output folder.
            recording: the recording's file, whose name gives {track} and {trackext}.
            stem: the stem's name.
            ext: the extension, by default the format's.
            below: {folder}, a relative path.
            tags: of the recording.

        Raises:
            ValueError: if the recording's name gives no track name, as ".wav" does, or if `below` is not a folder below
                another.
        """
        track, dot, trackext = recording.name.rpartition(".")
        track, trackext = (track, trackext) if dot else (trackext, "")
        if track in ("", ".", ".."):
            raise ValueError(f"{recording}: its name leaves none for its stems")
        if Path(below).is_absolute() or ".." in Path(below).parts:
            raise ValueError(f"below must be a relative path without '..', got {below!r}")
        fields = {"track": track, "trackext": trackext, "stem": stem, "ext": ext or self.format, "folder": below}
        fields |= _get_name_fields(tags or Tags())
        # Without a number, what sets it apart from the rest goes too: "{number} - {title}" is the title.
        pattern = self.filename if fields["number"] else re.sub(r"\{number\}(\. |[ _-])*", "", self.filename)
        return folder / pattern.format(**fields).lstrip("/")


def _get_name_fields(tags: Tags) -> dict[str, str]:
    """The tags as parts of a file's name."""
    fields = {name: _clean(getattr(tags, name)) or "unknown" for name in ("artist", "album", "title")}
    number = _clean(tags.number.partition("/")[0])
    return fields | {"number": number and number.zfill(2)}


def _clean(text: str) -> str:
    """A tag without what a file's name cannot hold: control characters, separators of folders, a dot at its start."""
    kept = "".join(c for c in text if unicodedata.category(c) not in ("Cc", "Cs", "Zl", "Zp"))
    kept = re.sub(r"[/\\]|^\.", "_", kept.strip())
    return kept.encode()[:_MAX_TAG].decode(errors="ignore").strip()


class StemFiles:
    """Files of equal sample rate, channels and length that are written together.

    This is a context manager: on leaving it, everything that was not committed is removed. Where a gain needs the peak
    of the whole track, samples wait in unnamed temporary files beside the targets.

    Args:
        paths: the file of each stem.
        sample_rate: in Hz.
        channels: of each stem.
        samples: per channel of each stem.
        output: how samples are stored and kept from clipping.

    Raises:
        ValueError: if the format cannot hold such audio.
        OSError: if a file cannot be written; so do its methods.
    """

    def __init__(self, paths: Mapping[str, Path], sample_rate: int, channels: int, samples: int, output: Output):
        output.encoding.check(sample_rate, channels)
        self._paths, self._sample_rate, self._channels, self._samples = dict(paths), sample_rate, channels, samples
        self._output = output
        self._peaks = dict.fromkeys(paths, np.float32(0))
        self._needs_peak = output.clip in ("rescale", "joint")
        self._stack = ExitStack()
        self._spools: dict[str, IO[bytes]] = {}
        self._files: dict[str, AudioFile] = {}

    def __enter__(self) -> StemFiles:
        try:
            for stem, path in self._paths.items():
                prepare_target(path, self._stack)
                if self._needs_peak:
                    self._spools[stem] = self._stack.enter_context(tempfile.TemporaryFile(dir=path.parent))
                else:
                    self._open(stem)
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def write(self, stems: Mapping[str, np.ndarray]) -> None:
        """Appends (C, n) samples to every stem."""
        for stem, audio in stems.items():
            if not np.isfinite(audio).all():
                raise ValueError(f"{stem} must be finite, got NaN or infinite samples")
            if self._needs_peak:
                self._peaks[stem] = max(self._peaks[stem], np.abs(audio).max(initial=0))
                self._spools[stem].write(np.ascontiguousarray(audio.T, np.float32).data)
            else:
                self._files[stem].write(np.clip(audio, -0.99, 0.99) if self._output.clip == "clamp" else audio)

    def commit(self) -> dict[str, float]:
        """Finishes all files and puts them in place, all or none; returns the gain of each stem."""
        divisors = {stem: max(np.float32(1.01) * peak, np.float32(1)) for stem, peak in self._peaks.items()}
        if self._output.clip == "joint":
            divisors = dict.fromkeys(divisors, max(divisors.values()))
        for stem in self._spools:
            self._open(stem)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda stem: self._finish(stem, divisors[stem]), self._paths))
        placed: list[AudioFile] = []
        with defer_interrupt():
            try:
                for file in self._files.values():
                    file.move_into_place()
                    placed.append(file)
            except OSError:
                for file in placed:
                    file.remove_from_place()
                raise
        return {stem: float(1 / divisor) for stem, divisor in divisors.items()}

    def _open(self, stem: str) -> None:
        encoding = self._output.encoding
        path = self._paths[stem]
        self._files[stem] = AudioFile(path, self._sample_rate, self._channels, self._samples, encoding, self._stack)

    def _finish(self, stem: str, divisor: np.float32) -> None:
        file = self._files[stem]
        if self._needs_peak:
            for audio in _read_blocks(self._spools[stem], self._channels):
                file.write(audio / divisor)
            self._spools[stem].close()
        file.close()


def _read_blocks(spool: IO[bytes], channels: int) -> Iterator[np.ndarray]:
    """The (C, n) samples of a temporary file, in blocks."""
    spool.seek(0)
    while block := spool.read(4 * BLOCK * channels):
        yield np.frombuffer(block, np.float32).reshape(-1, channels).T
