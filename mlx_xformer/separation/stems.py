"""Stems into files: protected from clipping, quantised, encoded, a stretch at a time, and all put in place at once.

Axes: C channels, n samples of a stretch.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from types import FrameType
from typing import IO, Any, Literal

import numpy as np
import soundfile

from ..audio.recording import BLOCK

Clip = Literal["rescale", "joint", "clamp", "none"]
Bits = Literal[16, 24, 32]
Format = Literal["wav", "flac", "mp3"]
_FIELDS = ("track", "trackext", "stem", "ext")
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
class Output:
    """How stems become files. ValueError names a field that is out of range.

    bits: of wav (16, 24, or 32 for floats) and flac (16, 24) samples. mp3_bitrate: kbit/s, by default the
    most there is. clip: what keeps samples
    within full scale: "rescale" divides each stem by 1.01 times its peak where that exceeds 1, "joint" all stems by the
    largest such divisor, so that they still add up, "clamp" cuts at 0.99, "none" leaves them. rate: "model", or "keep"
    for the recording's own. filename: a pattern of {track}, {trackext}, {stem} and {ext}, below the output folder.
    """

    format: Format = "wav"
    bits: Bits = 16
    mp3_bitrate: int | None = None
    clip: Clip = "rescale"
    rate: Literal["model", "keep"] = "model"
    filename: str = "{track}/{stem}.{ext}"

    def __post_init__(self) -> None:
        for name, allowed in (("format", ("wav", "flac", "mp3")), ("clip", ("rescale", "joint", "clamp", "none"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if self.rate not in ("model", "keep"):
            raise ValueError(f'rate must be "model" or "keep", got {self.rate!r}')
        if self.bits not in _SUBTYPES or (self.format == "flac" and self.bits == 32):
            allowed_bits = "16 or 24 for flac" if self.format == "flac" else "16, 24 or 32"
            raise ValueError(f"bits must be {allowed_bits}, got {self.bits}")
        known = sorted({kbps for rates in _MP3_RATES.values() for kbps in rates})
        if self.mp3_bitrate is not None and self.mp3_bitrate not in known:
            raise ValueError(f"mp3_bitrate must be one of {_listed(known)} kbit/s, got {self.mp3_bitrate}")
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

    16 bits give int16; 24 bits give int32 with the sample in the upper three bytes; 32 bits are the floats."""
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


def write(path: str | Path, audio: np.ndarray, rate: int, *, bits: Bits = 16, clip: Clip = "none") -> None:
    """Writes (channels, samples) as a WAV file, whole or not at all. bits, clip: see Output; integers hold no more than
    full scale in any case."""
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
        self._parts: dict[str, _Part] = {}

    def __enter__(self) -> StemFiles:
        try:
            for path in self._paths.values():
                if path.is_dir():
                    raise IsADirectoryError(errno.EISDIR, "is a directory", str(path))
            for stem, path in self._paths.items():
                self._make_folders(path.parent)
                _sweep(path)
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
        placed: list[_Part] = []
        with _uninterrupted():  # all or none
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
        with _uninterrupted():  # or a part is made that nobody knows of
            part = _Part(self._paths[stem], self._rate, self._channels, size, self._output)
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


class _Part:
    """One file under a temporary name beside its target, locked, so that others can tell it from what a kill left."""

    def __init__(self, path: Path, rate: int, channels: int, size: int, output: Output):
        self._path, self._output = path, output
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=_PART, dir=path.parent)
        self._temporary, self._sink = Path(name), _Sink(handle)
        with suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            with self._errors():
                self._file = soundfile.SoundFile(self._sink, "w", rate, channels, **_encoding(rate, size, output))
        except BaseException:
            self._leave()
            raise

    def write(self, audio: np.ndarray) -> None:
        """The next (C, n) floats."""
        samples = np.clip(audio, -1, 1) if self._output.format == "mp3" else quantize(audio, self._output.bits)
        with self._errors():
            self._file.write(samples.T)

    def close(self) -> None:
        """Ends the file."""
        with self._errors():
            self._file.close()
            self._sink.file.flush()
        if self._output.format == "wav" and self._output.bits == 32:
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


def _encoding(rate: int, size: int, output: Output) -> dict[str, Any]:
    """What soundfile calls an output's format; `size` is in bytes of samples."""
    if output.format == "mp3":
        low, high = _MP3_RATES[rate][0], _MP3_RATES[rate][-1]
        level = (high - (output.mp3_bitrate or high)) / (high - low)
        return {"format": "MP3", "bitrate_mode": "CONSTANT", "compression_level": min(level, 0.9999)}  # 1 is refused
    container = "FLAC" if output.format == "flac" else "RF64" if size > _WAV_LIMIT else "WAV"
    return {"format": container, "subtype": _SUBTYPES[output.bits]}


def _forget_time(path: Path) -> None:
    """libsndfile notes the time in the PEAK chunk of float files; without it equal samples make equal files."""
    with path.open("r+b") as file:
        at = file.read(4096).find(b"PEAK")
        if at >= 0:
            file.seek(at + 12)  # name, size and version come before
            file.write(bytes(4))


@contextmanager
def _uninterrupted() -> Iterator[None]:
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


def _sweep(path: Path) -> None:
    """Removes what a killed run left of a file: parts that nobody holds."""
    for part in path.parent.glob(f".{glob.escape(path.name)}.*{_PART}"):
        with suppress(OSError), part.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            part.unlink()


def _remove_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()
