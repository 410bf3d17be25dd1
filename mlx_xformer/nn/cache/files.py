"""Caches on disk, as safetensors.

Each cache i has tensors `i.keys` and `i.values` (B, G, P, ...) of the P positions that count: its kept first ones, if
others after them are gone, and then all from the first that still counts. Quantized ones are three tensors each,
`i.keys.packed`, `.scales` and `.biases` (see Quantized). A ragged batch has such tensors for every row b that has
begun, without its padding, as `i.b.keys` and so on. The metadata's entry `mlx_xformer.caches` is a JSON list of the
caches' options, `padding`, `length`, `longest` and `widths` (D, Dv); other entries are the caller's.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
from safetensors import SafetensorError, safe_open

from .kv import KVCache
from .rows import restore_cache

_ENTRY = "mlx_xformer.caches"
_LEAVES = {None: ("keys", "values")} | {
    bits: tuple(f"{name}.{part}" for name in ("keys", "values") for part in ("packed", "scales", "biases"))
    for bits in (8, 4)
}


def save_caches(path: str | Path, caches: Sequence[KVCache], metadata: Mapping[str, str] | None = None) -> None:
    """Writes caches and strings of yours to a file, whole or not at all. OSError if it cannot be written."""
    path, metadata = Path(path), dict(metadata or {})
    if _ENTRY in metadata:
        raise ValueError(f"metadata must not have an entry {_ENTRY}, which is the file's own")
    tensors: dict[str, mx.array] = {}
    described = []
    for index, cache in enumerate(caches):
        facts, rows = cache.state()
        described.append(facts)
        for row, parts in rows.items():
            place = str(index) if row is None else f"{index}.{row}"
            tensors |= {f"{place}.{leaf}": x for leaf, x in zip(_LEAVES[cache.bits], parts, strict=True)}
    _write(path, tensors, {**metadata, _ENTRY: json.dumps(described)})


def _write(path: Path, tensors: dict[str, mx.array], metadata: dict[str, str]) -> None:
    fresh = path.parent / f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.new.safetensors"
    try:
        mx.save_safetensors(str(fresh), tensors, metadata)
        with safe_open(fresh, framework="numpy"):  # which checks that it is whole
            pass
        fresh.replace(path)
    except (RuntimeError, SafetensorError) as error:
        raise OSError(f"{path} could not be written: {' '.join(str(error).split())}") from None
    finally:
        with contextlib.suppress(OSError):
            fresh.unlink()


def load_caches(path: str | Path) -> tuple[list[KVCache], dict[str, str]]:
    """The caches of a file and the strings saved with them. FileNotFoundError, or ValueError for any other file."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: {'not a file' if path.exists() else 'no such file'}")
    try:
        with safe_open(path, framework="numpy") as file:  # the header, and that the file is as long as it says
            metadata = dict(file.metadata() or {})
        tensors = cast(dict[str, mx.array], mx.load(str(path), format="safetensors"))
    except (SafetensorError, RuntimeError, OSError) as error:
        raise ValueError(f"{path}: not a whole safetensors file ({' '.join(str(error).split())})") from None
    if _ENTRY not in metadata:
        raise ValueError(f"{path}: no file of caches, its metadata has no {_ENTRY}")
    try:
        described = json.loads(metadata.pop(_ENTRY))
        caches = [_read(facts, index, tensors) for index, facts in enumerate(described)]
        if tensors:
            raise ValueError(f"no cache has a tensor {min(tensors)}")
        mx.eval([cache.arrays for cache in caches])  # the file may change from now on
    except (ValueError, TypeError, KeyError, ArithmeticError, RuntimeError, RecursionError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise ValueError(f"{path}: a damaged file of caches: {reason}") from None
    return caches, metadata


def _read(facts: dict[str, Any], index: int, tensors: dict[str, mx.array]) -> KVCache:
    """A cache of a file, whose tensors are taken out of the dict. KeyError or ValueError for what is not there."""
    leaves = _LEAVES[facts["bits"]]

    def parts(place: str) -> list[mx.array]:
        return [tensors.pop(f"{place}.{leaf}") for leaf in leaves]

    return restore_cache(facts, lambda row: parts(str(index) if row is None else f"{index}.{row}"))
