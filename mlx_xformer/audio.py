"""Audio files: read, resample, protect from clipping, write. The only module that imports the audio libraries.

Audio is float32 NumPy, (channels, samples), full scale at -1 and 1.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Literal

import numpy as np
import soundfile
import soxr

Clip = Literal["rescale", "clamp", "none"]
Bits = Literal[16, 24, 32]
_FOREIGN = {".m4a", ".aac", ".mp4", ".mov", ".mkv", ".webm", ".wma"}  # what libsndfile does not read
_CONVERT = " (convert it first, with ffmpeg -i IN OUT.wav)"
_UNKNOWN = 2**62  # frames
_SUBTYPES = {16: "PCM_16", 24: "PCM_24", 32: "FLOAT"}
_FASTEST = 10_000_000  # Hz
_WAV_LIMIT = 2**32 - 2**16  # bytes of samples that a WAV header can count; beyond it the file is RF64


def read(path: str | Path) -> tuple[np.ndarray, int]:
    """The samples (channels, samples) and the sample rate of any file that libsndfile reads.

    FileNotFoundError, IsADirectoryError; ValueError if it is not audio, is empty or holds NaN or Inf.
    """
    path = Path(path)
    check_readable(path)
    try:
        with soundfile.SoundFile(path) as file:
            if file.frames >= _UNKNOWN:  # a FLAC file that was written to a pipe
                raise ValueError(f"{path} cannot be read as audio: its header does not tell its length{_CONVERT}")
            samples, rate = file.read(dtype="float32", always_2d=True), file.samplerate
    except (soundfile.LibsndfileError, TypeError) as error:  # TypeError: headerless formats that only a name tells
        reason = str(error).removeprefix(f"Error opening {str(path)!r}: ")
        hint = _CONVERT if path.suffix.lower() in _FOREIGN else ""
        raise ValueError(f"{path} cannot be read as audio: {reason}{hint}") from None
    if not len(samples):
        raise ValueError(f"{path} holds no samples")
    if not np.isfinite(samples).all():
        raise ValueError(f"{path} holds NaN or infinite samples")
    return np.ascontiguousarray(samples.T), rate


def check_readable(path: Path) -> None:
    """FileNotFoundError or IsADirectoryError, before any work is done."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory, not an audio file")
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")


def check_writable(folder: Path) -> None:
    """OSError unless files can be written in `folder`, which need not exist yet; nothing is created."""
    existing = folder
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise NotADirectoryError(f"{folder} cannot be made: {existing} is not a directory")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(f"{folder} cannot be written: no permission to write in {existing}")


def resample(audio: np.ndarray, from_rate: int, to_rate: int) -> np.ndarray:
    """(channels, samples) at another sample rate, by libsoxr at very high quality."""
    for name, rate in (("from_rate", from_rate), ("to_rate", to_rate)):
        if not isinstance(rate, (int, np.integer)) or not 1 <= rate <= _FASTEST:
            raise ValueError(f"{name} must be a whole number of Hz from 1 to {_FASTEST}, got {rate!r}")
    if from_rate == to_rate:
        return audio
    return np.ascontiguousarray(soxr.resample(audio.T, from_rate, to_rate, quality="VHQ").T)


def convert_channels(audio: np.ndarray, channels: int) -> np.ndarray:
    """(c, samples) -> (channels, samples): mono is repeated, one channel is the mean, else the first are taken."""
    given = audio.shape[0]
    if given == channels:
        return audio
    if channels == 1:
        return audio.mean(axis=0, keepdims=True)
    if given == 1:
        return np.repeat(audio, channels, axis=0)
    if given < channels:
        raise ValueError(f"audio must be mono or have at least {channels} channels, got {given}")
    return audio[:channels]


def prevent_clipping(audio: np.ndarray, mode: Clip) -> np.ndarray:
    """Keeps samples within full scale: "rescale" divides by 1.01 times the peak where that exceeds 1, "clamp" cuts at
    0.99, "none" leaves them. Source: demucs/audio.py, prevent_clip."""
    if mode == "none":
        return audio
    if mode == "clamp":
        return np.clip(audio, -0.99, 0.99)
    if mode == "rescale":
        return audio / max(np.float32(1.01) * np.abs(audio).max(initial=0), np.float32(1))
    raise ValueError(f'clip must be "rescale", "clamp" or "none", got {mode!r}')


def quantize(audio: np.ndarray, bits: Bits) -> np.ndarray:
    """Integer samples: clamped to full scale and truncated towards zero, without dither, as demucs writes them.

    16 bits give int16; 24 bits give int32 with the sample in the upper three bytes; 32 bits are the floats."""
    if bits == 32:
        return audio.astype(np.float32)
    clamped = np.clip(audio.astype(np.float32), -1, 1)
    if bits == 16:
        return (clamped * np.float32(2**15 - 1)).astype(np.int16)
    if bits == 24:
        return (clamped * np.float32(2**23 - 1)).astype(np.int32) << 8
    raise ValueError(f"bits must be 16, 24 or 32, got {bits}")


def write(path: str | Path, audio: np.ndarray, rate: int, *, bits: Bits = 16) -> None:
    """Writes (channels, samples) as a WAV file of 16 or 24 bit integers or 32 bit floats, whole or not at all."""
    write_all({Path(path): audio}, rate, bits=bits)


def write_all(files: Mapping[Path, np.ndarray], rate: int, *, bits: Bits = 16) -> None:
    """Writes several WAV files: each to a temporary file beside its target, and all renamed once all are written.

    Missing folders are made; on failure nothing is left behind. OSError says what went wrong."""
    if bits not in _SUBTYPES:
        raise ValueError(f"bits must be 16, 24 or 32, got {bits}")
    written: list[tuple[str, Path]] = []
    made: list[Path] = []
    try:
        for path, audio in files.items():
            made += _make_folders(path.parent)
            handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
            os.close(handle)
            written.append((temporary, path))
            audio = np.asarray(audio)
            if audio.ndim != 2 or not 1 <= audio.shape[0] <= 1024:
                raise ValueError(f"audio must be (channels, samples) with at most 1024 channels, got {audio.shape}")
            samples = quantize(audio, bits).T
            container = "RF64" if samples.size * bits // 8 > _WAV_LIMIT else "WAV"
            soundfile.write(temporary, samples, rate, subtype=_SUBTYPES[bits], format=container)
        mask = os.umask(0)
        os.umask(mask)
        for temporary, path in written:
            os.chmod(temporary, 0o666 & ~mask)
            os.replace(temporary, path)
    except soundfile.LibsndfileError as error:
        raise OSError(f"could not write {path}: {error}") from None
    finally:
        for temporary, _ in written:
            Path(temporary).unlink(missing_ok=True)
        for folder in reversed(made):
            with suppress(OSError):
                folder.rmdir()  # only if it stayed empty


def _make_folders(folder: Path) -> list[Path]:
    """Makes `folder` and its missing parents; returns those it made, outermost first."""
    missing = [f for f in (folder, *folder.parents) if not f.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing[::-1]
