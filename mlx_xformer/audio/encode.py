"""Recordings into files: encodings, samples of integers, and files that are there whole or not at all.

Axes: C channels, n samples of a block.
"""

from __future__ import annotations

import fcntl
import glob
import io
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import numpy as np
import soundfile

Bits = Literal[16, 24, 32]
Format = Literal["wav", "flac", "mp3"]
_SUBTYPES = {16: "PCM_16", 24: "PCM_24", 32: "FLOAT"}
_WAV_LIMIT = 2**32 - 2**16  # bytes of samples that a WAV header can count; beyond it the file is RF64
_MP3_RATES = {  # Hz: the bit rates that MP3 has there, kbit/s
    **dict.fromkeys((32000, 44100, 48000), (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)),
    **dict.fromkeys((16000, 22050, 24000), (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)),
    **dict.fromkeys((8000, 11025, 12000), (8, 16, 24, 32, 40, 48, 56, 64)),
}
_FLAC = (8, 655350)  # most channels, most Hz
_PART = ".part"  # how the name of an unfinished file ends


@dataclass(frozen=True)
class Encoding:
    """How samples become a file. ValueError names a field that is out of range.

    bits: of wav (16, 24, or 32 for floats) and flac (16, 24) samples. mp3_bitrate: kbit/s, by default the most there
    is.
    """

    format: Format = "wav"
    bits: Bits = 16
    mp3_bitrate: int | None = None

    def __post_init__(self) -> None:
        if self.format not in ("wav", "flac", "mp3"):
            raise ValueError(f"format must be one of wav, flac, mp3, got {self.format!r}")
        if self.bits not in _SUBTYPES or (self.format == "flac" and self.bits == 32):
            allowed_bits = "16 or 24 for flac" if self.format == "flac" else "16, 24 or 32"
            raise ValueError(f"bits must be {allowed_bits}, got {self.bits}")
        known = sorted({kbps for rates in _MP3_RATES.values() for kbps in rates})
        if self.mp3_bitrate is not None and self.mp3_bitrate not in known:
            raise ValueError(f"mp3_bitrate must be one of {_listed(known)} kbit/s, got {self.mp3_bitrate}")

    def check(self, rate: int, channels: int) -> None:
        """ValueError where the format cannot hold audio of this rate and these channels."""
        if self.format == "mp3":
            if rate not in _MP3_RATES or channels > 2:
                raise ValueError(
                    f"mp3 holds 1 or 2 channels at {_listed(sorted(_MP3_RATES))} Hz, got {channels} at {rate} Hz"
                )
            if self.mp3_bitrate is not None and self.mp3_bitrate not in _MP3_RATES[rate]:
                known = _listed(_MP3_RATES[rate])
                raise ValueError(f"mp3_bitrate must be one of {known} kbit/s at {rate} Hz, got {self.mp3_bitrate}")
        if self.format == "flac" and (channels > _FLAC[0] or rate > _FLAC[1]):
            raise ValueError(f"flac holds at most {_FLAC[0]} channels and {_FLAC[1]} Hz, got {channels} at {rate} Hz")


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))


def quantize(audio: np.ndarray, bits: Bits) -> np.ndarray:
    """Integer samples: clamped to full scale and truncated towards zero, without dither, as demucs writes them.

    16 bits give int16; 24 bits give int32 with the sample in the upper three bytes; 32 bits are the floats.
    """
    if bits == 32:
        return audio.astype(np.float32)
    clamped = np.clip(audio.astype(np.float32), -1, 1)
    if bits == 16:
        return (clamped * np.float32(2**15 - 1)).astype(np.int16)
    if bits == 24:
        return (clamped * np.float32(2**23 - 1)).astype(np.int32) << 8
    raise ValueError(f"bits must be 16, 24 or 32, got {bits}")


def check_writable(folder: Path) -> None:
    """OSError unless files can be written in `folder`, which need not exist yet; nothing is created."""
    existing = folder
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise NotADirectoryError(f"{folder} cannot be made: {existing} is not a directory")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(f"{folder} cannot be written: no permission to write in {existing}")


def encode_mp3(audio: np.ndarray, rate: int, bitrate: int) -> bytes:
    """(C, n) at `rate` Hz as an MP3 file of `bitrate` kbit/s."""
    options = _soundfile_options(rate, 0, Encoding("mp3", mp3_bitrate=bitrate))
    out = io.BytesIO()
    soundfile.write(out, audio.T, rate, **options)
    return out.getvalue()


class PartFile:
    """One file under a temporary name beside its target, locked, so that others can tell it from what a kill left."""

    def __init__(self, path: Path, rate: int, channels: int, size: int, encoding: Encoding):
        self._path, self._encoding = path, encoding
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=_PART, dir=path.parent)
        self._temporary, self._sink = Path(name), _Sink(handle)
        with suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            with self._errors():
                self._file = soundfile.SoundFile(
                    self._sink, "w", rate, channels, **_soundfile_options(rate, size, encoding)
                )
        except BaseException:
            self._leave()
            raise

    def write(self, audio: np.ndarray) -> None:
        """The next (C, n) floats."""
        samples = np.clip(audio, -1, 1) if self._encoding.format == "mp3" else quantize(audio, self._encoding.bits)
        with self._errors():
            self._file.write(samples.T)

    def close(self) -> None:
        """Ends the file."""
        with self._errors():
            self._file.close()
            self._sink.file.flush()
        if self._encoding.format == "wav" and self._encoding.bits == 32:
            _forget_time(self._temporary)

    def place(self) -> None:
        """Gives the file its name, with the permissions of any new file."""
        mask = os.umask(0)
        os.umask(mask)
        try:
            os.chmod(self._temporary, 0o666 & ~mask)
            os.replace(self._temporary, self._path)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from None

    def withdraw(self) -> None:
        """Takes a file out of its place again."""
        self._path.unlink(missing_ok=True)

    def discard(self) -> None:
        """Lets go of everything but a file in place."""
        with suppress(OSError, soundfile.LibsndfileError):
            self._file.close()
        self._leave()

    def _leave(self) -> None:
        self._temporary.unlink(missing_ok=True)
        with suppress(OSError):  # what could not be written is not written here, either
            self._sink.file.close()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        failure: BaseException | None = None
        try:
            yield
        except (soundfile.LibsndfileError, AssertionError, OSError) as error:  # soundfile asserts that all was written
            failure = error
        failure = self._sink.error or failure
        if isinstance(failure, Exception):
            raise OSError(f"could not write {self._path}: {getattr(failure, 'strerror', None) or failure}")
        if failure is not None:
            raise failure


class _Sink:
    """A file for libsndfile, which passes over some errors, as of a full disk: they are kept here."""

    def __init__(self, handle: int):
        self.file = os.fdopen(handle, "w+b")
        self.error: BaseException | None = None

    def _tried(self, call: Callable[..., int], *arguments: Any) -> int:
        try:
            return call(*arguments) if self.error is None else 0
        except BaseException as error:  # also Ctrl-C: nothing may be raised through libsndfile
            self.error = error
            return 0

    def write(self, data: Any) -> int:
        return self._tried(self.file.write, data)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._tried(self.file.seek, offset, whence)

    def tell(self) -> int:
        return self._tried(self.file.tell)

    def read(self, size: int) -> bytes:
        return self.file.read(size)


def _soundfile_options(rate: int, size: int, encoding: Encoding) -> dict[str, Any]:
    """What soundfile calls an encoding; `size` is in bytes of samples."""
    if encoding.format == "mp3":
        low, high = _MP3_RATES[rate][0], _MP3_RATES[rate][-1]
        level = (high - (encoding.mp3_bitrate or high)) / (high - low)
        return {"format": "MP3", "bitrate_mode": "CONSTANT", "compression_level": min(level, 0.9999)}  # 1 is refused
    container = "FLAC" if encoding.format == "flac" else "RF64" if size > _WAV_LIMIT else "WAV"
    return {"format": container, "subtype": _SUBTYPES[encoding.bits]}


def _forget_time(path: Path) -> None:
    """libsndfile notes the time in the PEAK chunk of float files; without it equal samples make equal files."""
    with path.open("r+b") as file:
        at = file.read(4096).find(b"PEAK")
        if at >= 0:
            file.seek(at + 12)  # name, size and version come before
            file.write(bytes(4))


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C waits. It goes to the main thread; in others there is nothing to wait for."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[tuple[int, FrameType | None]] = []
    before = signal.signal(signal.SIGINT, lambda *which: came.append(which))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL if before is None else before)  # None: not set from Python
        if came and callable(before):
            before(*came[0])


def remove_parts(path: Path) -> None:
    """Removes what a killed run left of a file: parts that nobody holds."""
    for part in path.parent.glob(f".{glob.escape(path.name)}.*{_PART}"):
        with suppress(OSError), part.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            part.unlink()
