"""Files that are written beside their target and take its place when they are whole."""

from __future__ import annotations

import fcntl
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

_PREFIX, _SUFFIX = ".unfinished-", ".part"
_NEW = 60  # seconds: a younger file may belong to a process that has not locked it yet


@contextmanager
def replace_file(path: Path) -> Iterator[IO[bytes]]:
    """Opens a new file that is renamed to `path` at the end of the block, or removed if the block raises.

    Missing folders are created. What killed processes left in the folder is removed: nobody holds its lock.

    Args:
        path: the target; an older file is replaced.

    Yields:
        The file, for bytes.

    Raises:
        OSError: if the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for part in path.parent.glob(f"{_PREFIX}*{_SUFFIX}"):
        with suppress(OSError), part.open("rb") as left:
            fcntl.flock(left, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if time.time() - os.fstat(left.fileno()).st_mtime > _NEW:
                part.unlink()
    handle, name = tempfile.mkstemp(prefix=_PREFIX, suffix=_SUFFIX, dir=path.parent)
    try:
        with open(handle, "wb") as out:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(out, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield out
        mask = os.umask(0)
        os.umask(mask)
        with suppress(OSError):  # a file system without permissions
            os.chmod(name, 0o666 & ~mask)
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)
