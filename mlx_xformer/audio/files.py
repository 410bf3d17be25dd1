"""Audio files, written under a temporary name and put in place when they are complete.

Axes: C channels, n samples of a block.
"""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType

import numpy as np

from .encode import Encoder, Encoding, get_library_errors, open_encoder
from .quantization import Bits
from .sink import Sink

_MAX_CHANNELS = 1024  # the most that libsndfile writes
_PREFIX, _SUFFIX = ".mlx-xformer-", ".part"  # of unfinished files; short, as a target may have a name of any length


def write(path: str | Path, audio: np.ndarray, sample_rate: int, *, bits: Bits = 16) -> None:
    """Writes audio as a WAV file, complete or not at all. Missing folders are created.

    Args:
        path: the file to write; an older one is replaced.
        audio: (channels, samples) of floats, full scale at -1 and 1. Integer samples are clamped to full scale.
        sample_rate: in Hz.
        bits: per sample, 16 or 24 for integers or 32 for floats.

    Raises:
        ValueError: if an argument is out of range, or if samples are not finite.
        OSError: if the file cannot be written.
    """
    path, audio, encoding = Path(path), np.asarray(audio), Encoding(bits=bits)
    if audio.ndim != 2 or not 1 <= audio.shape[0] <= _MAX_CHANNELS:
        must = f"audio must be (channels, samples) with at most {_MAX_CHANNELS} channels"
        raise ValueError(f"{must}, got {audio.shape}")
    if not np.isfinite(audio).all():
        raise ValueError("audio must be finite, got NaN or infinite samples")
    with ExitStack() as stack:
        prepare_target(path, stack)
        channels, samples = audio.shape
        file = AudioFile(path, lambda sink: open_encoder(sink, sample_rate, channels, samples, encoding), stack)
        file.write(audio)
        file.close()
        file.move_into_place()


def check_writable(folder: Path) -> None:
    """Checks that files can be written in a folder, which need not exist yet. Creates nothing.

    Raises:
        OSError: if they cannot.
    """
    existing = folder
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise NotADirectoryError(f"{folder} cannot be made: {existing} is not a directory")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(f"{folder} cannot be written: no permission to write in {existing}")


def prepare_target(path: Path, stack: ExitStack) -> None:
    """Creates the missing folders of a file and removes what killed processes left in its folder.

    Args:
        path: the file to be written.
        stack: removes the new folders that stay empty.

    Raises:
        OSError: if `path` is a folder or its folder cannot be created.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "is a directory", str(path))
    for missing in reversed([folder for folder in (path.parent, *path.parent.parents) if not folder.exists()]):
        stack.callback(_remove_if_empty, missing)
        missing.mkdir(exist_ok=True)
    for part in path.parent.glob(f"{_PREFIX}*{_SUFFIX}"):
        with suppress(OSError), part.open("rb") as file:  # locked, and so skipped, if a process still writes it
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            part.unlink()


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


class AudioFile:
    """An audio file that is being written, under a temporary name beside its target.

    `stack` removes it unless move_into_place() was called. A lock shows other processes that it is in use.

    Args:
        path: the target, in an existing folder.
        open_encoder: makes what encodes the file.
        stack: what closes the file.

    Raises:
        OSError: if the file cannot be written; so do its methods.
    """

    def __init__(self, path: Path, open_encoder: Callable[[Sink], Encoder], stack: ExitStack) -> None:
        self._path = path
        with defer_interrupt():  # an interrupt in here would leave a file that nothing removes
            handle, name = _make_temporary(path.parent)
            self._temporary, self._sink = Path(name), Sink(os.fdopen(handle, "w+b"), path.parent)
            try:
                with self._raising():
                    self._encoder = open_encoder(self._sink)
            except BaseException:
                self._delete()
                raise
            stack.callback(self._discard)

    def write(self, *tracks: np.ndarray) -> None:
        """Appends (C, n) float samples to each track of the file; most files have one."""
        with self._raising():
            self._encoder.write(*tracks)

    def close(self) -> None:
        """Finishes the file under its temporary name."""
        with self._raising():
            self._encoder.close()
            self._sink.file.flush()

    def move_into_place(self) -> None:
        """Renames the finished file to its target, with the permissions that any new file gets."""
        mask = os.umask(0)
        os.umask(mask)
        with suppress(OSError):  # a file system without permissions
            os.chmod(self._temporary, 0o666 & ~mask)
        try:
            os.replace(self._temporary, self._path)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from None

    def remove_from_place(self) -> None:
        """Deletes the file that move_into_place() put there."""
        self._path.unlink(missing_ok=True)

    def _discard(self) -> None:
        self._sink.stop()
        del self._encoder  # what it still writes goes nowhere
        self._delete()

    def _delete(self) -> None:
        self._temporary.unlink(missing_ok=True)
        with suppress(OSError):  # closing writes what is buffered, which fails again where writing failed
            self._sink.file.close()

    @contextmanager
    def _raising(self) -> Iterator[None]:
        """Raises an error of the encoder's library or of the sink as an OSError that names the file."""
        failure: BaseException | None = None
        try:
            yield
        except get_library_errors() as error:
            failure = error
        failure = self._sink.error or failure
        if isinstance(failure, Exception):
            raise OSError(f"could not write {self._path}: {getattr(failure, 'strerror', None) or failure}")
        if failure is not None:
            raise failure


def _make_temporary(folder: Path) -> tuple[int, str]:
    """Makes a locked file: its handle and its path."""
    while True:
        handle, name = tempfile.mkstemp(prefix=_PREFIX, suffix=_SUFFIX, dir=folder)
        with suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        if os.fstat(handle).st_nlink:
            return handle, name
        os.close(handle)  # another process took it, not yet locked, for a leftover, and removed it


@contextmanager
def defer_interrupt() -> Iterator[None]:
    """Delays Ctrl-C until the end of the block. Only the main thread receives it; other threads do nothing here."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[tuple[int, FrameType | None]] = []
    before = signal.signal(signal.SIGINT, lambda *arguments: received.append(arguments))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL if before is None else before)  # None: not set from Python
        if received and callable(before):
            before(*received[0])
