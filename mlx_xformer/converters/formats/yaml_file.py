"""Reads a small YAML file of plain values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from ...storage.messages import shorten

_MAX_BYTES = 1 << 16
_MAX_BRACKETS = 1000


def read_yaml(path: Path, loader: type[yaml.SafeLoader] = yaml.SafeLoader) -> Any:
    """Reads a file.

    Args:
        path: The file, of at most 64 KiB and without aliases.
        loader: The class that makes values of its tags.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not plain YAML. The message begins with the path.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: {'a folder, not a file' if path.is_dir() else 'no such file'}")
    if path.stat().st_size > _MAX_BYTES:
        raise ValueError(f"{path}: must be at most {_MAX_BYTES} bytes, got {path.stat().st_size}")
    try:
        text = path.read_text("utf-8")
        if text.count("[") + text.count("{") > _MAX_BRACKETS:
            raise ValueError("too many brackets")  # the time that nested ones take grows with their square
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text)):
            raise ValueError("aliases are refused")  # a few lines of them can stand for a value without end
        return yaml.load(text, loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not plain YAML ({shorten(error)})") from None
