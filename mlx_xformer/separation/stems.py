"""Stems into files: protected from clipping, quantised, encoded, a stretch at a time, and all put in place at once.

Axes: C channels, n samples of a stretch.
"""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import IO, Literal

import numpy as np

from ..audio.encode import Bits, Encoding, PartFile, remove_parts, uninterrupted
from ..audio.recording import BLOCK

Clip = Literal["rescale", "joint", "clamp", "none"]
_FIELDS = ("track", "trackext", "stem", "ext")


@dataclass(frozen=True)
class Output(Encoding):
    """How stems become files. ValueError names a field that is out of range.

    format, bits, mp3_bitrate: see Encoding. clip: what keeps samples within full scale: "rescale" divides each stem by
    1.01 times its peak where that exceeds 1, "joint" all stems by the largest such divisor, so that they still add up,
    "clamp" cuts at 0.99, "none" leaves them. rate: "model", or "keep" for the recording's own. filename: a pattern of
    {track}, {trackext}, {stem} and {ext}, below the output folder.
    """

    clip: Clip = "rescale"
    rate: Literal["model", "keep"] = "model"
    filename: str = "{track}/{stem}.{ext}"

    def __post_init__(self) -> None:
        super().__post_init__()
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

    def path(self, folder: Path, recording: Path, stem: str, ext: str | None = None) -> Path:
        """Where a stem of a recording goes. ValueError if the recording's name leaves no name."""
        track, _, trackext = recording.name.rpartition(".")
        track, trackext = (track, trackext) if _ else (trackext, "")
        if track in ("", ".", ".."):
            raise ValueError(f"{recording}: its name leaves none for its stems")
        return folder / self.filename.format(track=track, trackext=trackext, stem=stem, ext=ext or self.format)


def write(path: str | Path, audio: np.ndarray, rate: int, *, bits: Bits = 16, clip: Clip = "none") -> None:
    """Writes (channels, samples) as a WAV file, whole or not at all.

    bits, clip: see Output; integers hold no more than full scale in any case.
    """
    audio = np.asarray(audio)
    if audio.ndim != 2 or not 1 <= audio.shape[0] <= 1024:
        raise ValueError(f"audio must be (channels, samples) with at most 1024 channels, got {audio.shape}")
    output = Output(bits=bits, clip=clip)
    with StemFiles({"": Path(path)}, rate, audio.shape[0], audio.shape[1], output) as files:
        files.write({"": audio})
        files.commit()


class StemFiles:
    """Files of equal rate, channels and length, written in step. A context: what is not committed leaves nothing.

    Where a gain needs the whole track, samples wait in unnamed temporary files beside the targets.
    OSError says what could not be written.
    """

    def __init__(self, paths: Mapping[str, Path], rate: int, channels: int, samples: int, output: Output):
        output.check(rate, channels)
        self._paths, self._rate, self._channels, self._samples = dict(paths), rate, channels, samples
        self._output = output
        self._peaks = dict.fromkeys(paths, np.float32(0))
        self._waits = output.clip in ("rescale", "joint")
        self._stack = ExitStack()
        self._spools: dict[str, IO[bytes]] = {}
        self._parts: dict[str, PartFile] = {}

    def __enter__(self) -> StemFiles:
        try:
            for path in self._paths.values():
                if path.is_dir():
                    raise IsADirectoryError(errno.EISDIR, "is a directory", str(path))
            for stem, path in self._paths.items():
                self._make_folders(path.parent)
                remove_parts(path)
                if self._waits:
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
        """The next (C, n) of every stem."""
        for stem, audio in stems.items():
            if not np.isfinite(audio).all():
                raise ValueError(f"{stem} must be finite, got NaN or infinite samples")
            if self._waits:
                self._peaks[stem] = max(self._peaks[stem], np.abs(audio).max(initial=0))
                self._spools[stem].write(np.ascontiguousarray(audio.T, np.float32).data)
            else:
                self._parts[stem].write(np.clip(audio, -0.99, 0.99) if self._output.clip == "clamp" else audio)

    def commit(self) -> dict[str, float]:
        """Finishes all files and puts them in place; returns the gain that each stem got."""
        divisors = {stem: max(np.float32(1.01) * peak, np.float32(1)) for stem, peak in self._peaks.items()}
        if self._output.clip == "joint":
            divisors = dict.fromkeys(divisors, max(divisors.values()))
        for stem in self._spools:
            self._open(stem)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda stem: self._finish(stem, divisors[stem]), self._paths))
        placed: list[PartFile] = []
        with uninterrupted():  # all or none
            try:
                for part in self._parts.values():
                    part.place()
                    placed.append(part)
            except OSError:
                for part in placed:
                    part.withdraw()
                raise
        return {stem: float(1 / divisor) for stem, divisor in divisors.items()}

    def _make_folders(self, folder: Path) -> None:
        """Makes what is missing of a folder, to go again if it stays empty."""
        for missing in reversed([f for f in (folder, *folder.parents) if not f.exists()]):
            self._stack.callback(_remove_empty, missing)
            missing.mkdir(exist_ok=True)

    def _open(self, stem: str) -> None:
        size = self._samples * self._channels * self._output.bits // 8
        with uninterrupted():  # or a part is made that nobody knows of
            part = PartFile(self._paths[stem], self._rate, self._channels, size, self._output)
            self._stack.callback(part.discard)
            self._parts[stem] = part

    def _finish(self, stem: str, divisor: np.float32) -> None:
        part = self._parts[stem]
        if self._waits:
            for audio in _stretches(self._spools[stem], self._channels):
                part.write(audio / divisor)
            self._spools[stem].close()
        part.close()


def _stretches(spool: IO[bytes], channels: int) -> Iterator[np.ndarray]:
    spool.seek(0)
    while block := spool.read(4 * BLOCK * channels):
        yield np.frombuffer(block, np.float32).reshape(-1, channels).T


def _remove_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()
