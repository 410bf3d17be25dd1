"""GGUF files, as far as MLX reads them: floats, Q4_0, Q4_1 or Q8_0, which stay packed.

MLX reads such a file as a whole: all of its tensors are in memory. Source: the GGUF specification.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np

from ...storage.messages import shorten
from ..converter import Original
from ..stored import hold_array
from .gguf_tokenizer import make_tokenizer_files


def find_file(path: Path) -> Path | None:
    """The GGUF file that a path names: itself, or the only one in a folder without a config.json."""
    if path.is_dir() and not (path / "config.json").exists():
        found = sorted(path.glob("*.gguf"))
        return found[0] if len(found) == 1 else None
    return path if path.suffix == ".gguf" and path.is_file() else None


def open_file(path: Path) -> Original:
    """What a file holds; `values` are its metadata. ValueError, in one line, begins with the path."""
    try:
        tensors, raw = cast(Any, mx.load(str(path), return_metadata=True))
    except RuntimeError as error:
        raise ValueError(f"{path}: MLX cannot read it ({shorten(error)})") from None
    values = {key: _plain(value) for key, value in raw.items()}
    extras, warnings = make_tokenizer_files(values)
    stored = {name: hold_array(x) for name, x in tensors.items()}
    return Original(path, path.stem, values, stored, (path,), extras, warnings=warnings)


def _plain(value: Any) -> Any:
    """A scalar as a number, float32 by its shortest decimals; anything else as it is."""
    if not isinstance(value, mx.array) or value.size != 1:
        return value
    return float(str(np.float32(cast(float, value.item())))) if value.dtype == mx.float32 else value.item()
