"""Where a recording's bytes come from: a file, or standard input kept in an unnamed file."""

from __future__ import annotations

import io
import os
import shutil
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO, BinaryIO


@dataclass(frozen=True)
class Source:
    """A file that is kept open, and read any number of times and in several places at once.

    Args:
        name: for messages.
        size: in bytes.
        handle: the open file.
    """

    name: str
    size: int
    handle: Handle

    @staticmethod
    def of_file(path: Path) -> Source:
        """A regular file that is not empty.

        Raises:
            OSError: if the file does not exist, is a folder or cannot be read.
            ValueError: if it is empty, or a pipe or device.
        """
        check_readable(path)
        found = path.stat()
        if stat.S_ISFIFO(found.st_mode):
            raise ValueError(f'{path} is a pipe, which cannot be read twice; "-" reads standard input')
        if not stat.S_ISREG(found.st_mode):
            raise ValueError(f"{path} is not a regular file")
        if not found.st_size:
            raise ValueError(f"{path} is empty")
        return Source(str(path), found.st_size, Handle(os.open(path, os.O_RDONLY)))

    @staticmethod
    def of_stream(file: IO[bytes], name: str) -> Source:
        """A stream of bytes, copied into an unnamed temporary file.

        Raises:
            ValueError: if there are none.
            OSError: if the temporary file cannot be written.
        """
        with tempfile.TemporaryFile() as spool:
            shutil.copyfileobj(file, spool)
            spool.flush()
            if not spool.tell():
                raise ValueError(f"{name} is empty")
            return Source(name, spool.tell(), Handle(os.dup(spool.fileno())))

    def open(self, start: int = 0, end: int | None = None) -> BinaryIO:
        """Returns a new reader of the bytes from `start` to `end`, which appear to it as a whole file."""
        last = self.size if end is None else end
        return io.BufferedReader(_Part(self.handle, start, last - start), 2**16)


class Handle:
    """An open file that is closed when nothing refers to it any more.

    Args:
        descriptor: of the file, as os.open() gives it.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def __del__(self) -> None:
        os.close(self._descriptor)

    def read_at(self, start: int, count: int) -> bytes:
        """Reads up to `count` bytes from `start` on."""
        return os.pread(self._descriptor, count, start)


class _Part(io.RawIOBase):
    """A reader with a position of its own."""

    def __init__(self, handle: Handle, start: int, size: int) -> None:
        self._handle, self._start, self._size, self._at = handle, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        count = max(0, min(len(buffer), self._size - self._at))
        data = self._handle.read_at(self._start + self._at, count)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise ValueError(f"offset must not lead before the first byte, got {base + offset}")
        self._at = base + offset
        return self._at

    def tell(self) -> int:
        return self._at


class FileForC:
    """A file for a C library. Its seek() returns -1 instead of raising, since an exception would only be printed.

    Args:
        file: the file.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.read, self.tell, self._seek = file.read, file.tell, file.seek

    def seek(self, offset: int, whence: int = 0) -> int:
        """Moves to a position and returns it; stays and returns -1 where there is none."""
        try:
            return self._seek(offset, whence)
        except (OSError, ValueError):
            return -1


def check_readable(path: Path) -> None:
    """Checks that a file exists, before any work is done.

    Raises:
        FileNotFoundError: if it does not.
        IsADirectoryError: if it is a folder.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory, not an audio file")
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
