"""Sink: a file object for libraries that are written in C."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import IO, Any


class Sink:
    """A file object that raises nothing and keeps the first error.

    libsndfile ignores some errors, as of a full disk, and PyAV prints exceptions that it cannot pass on.

    Args:
        file: the file itself, open for reading and writing.
        folder: where temporary files may be made.

    Attributes:
        error: what was raised first. Nothing is read or written after it.
    """

    def __init__(self, file: IO[bytes], folder: Path) -> None:
        self.file, self.folder = file, folder
        self.error: BaseException | None = None

    def stop(self) -> None:
        """Ignores all that is written from now on."""
        self.error = self.error or InterruptedError("writing was stopped")

    def _try(self, call: Callable[..., Any], *arguments: Any, failed: Any = 0) -> Any:
        try:
            return call(*arguments) if self.error is None else failed
        except BaseException as error:  # Ctrl-C too
            self.error = error
            return failed

    def write(self, data: Any) -> int:
        """Writes bytes, and returns how many they are."""
        return self._try(self.file.write, data)

    def seek(self, offset: int, whence: int = 0) -> int:
        """Moves to another place, and returns it."""
        return self._try(self.file.seek, offset, whence)

    def tell(self) -> int:
        """Returns the place."""
        return self._try(self.file.tell)

    def read(self, size: int) -> bytes:
        """Reads at most `size` bytes."""
        return self._try(self.file.read, size, failed=b"")
