"""What models check of their inputs where they come in."""

from __future__ import annotations

from itertools import chain
from typing import cast

import mlx.core as mx
import numpy as np

_FEW = 64  # numbers that are read sooner as a list than as a NumPy array


def check_tokens(name: str, tokens: mx.array, size: int | None = None) -> None:
    """ValueError unless tokens are whole numbers (batch, length), from 0 to `size` - 1 if it is given.

    MLX reads beyond the end of a table of embeddings without an error. Without a size the tokens are not read, so that
    a step can be queued before they are computed. What mx.compile or mx.vmap traces has no values, and is not read.
    """
    if tokens.ndim != 2 or not mx.issubdtype(tokens.dtype, mx.integer):
        raise ValueError(f"{name} must be (batch, length) whole numbers, got shape {tokens.shape} {tokens.dtype}")
    if size is not None:
        check_range(name, tokens, size)


def check_range(name: str, tokens: mx.array, size: int, other: int | None = None) -> None:
    """ValueError for a number that is not from 0 to `size` - 1, nor `other`. Traced arrays are not read."""
    if not tokens.size:
        return
    try:
        if tokens.ndim == 2 and tokens.size <= _FEW:
            numbers = list(chain.from_iterable(cast("list[list[int]]", tokens.tolist())))
        else:
            array = np.asarray(tokens)
            numbers = [int(array.min()), int(array.max())] if other is None else array[array != other].tolist()
    except (ValueError, RuntimeError):  # traced by mx.compile or mx.vmap
        return
    wrong = [number for number in numbers if not 0 <= number < size and number != other]
    if wrong:
        raise ValueError(f"{name} must be from 0 to {size - 1}, got {wrong[0]}")


def check_last(last: int | None) -> None:
    """ValueError unless the number of last positions is None or from 0."""
    if last is not None and last < 0:
        raise ValueError(f"last must be at least 0, got {last}")


def check_vectors(name: str, x: mx.array, width: int) -> None:
    """ValueError unless x is (batch, length, width) of floats."""
    if x.ndim != 3 or x.shape[-1] != width or not mx.issubdtype(x.dtype, mx.floating):
        raise ValueError(f"{name} must be (batch, length, {width}) of floats, got {x.dtype} {x.shape}")


def check_mask(name: str, mask: mx.array, shape: tuple[int, ...]) -> None:
    """ValueError unless a mask is boolean and of this shape."""
    if mask.dtype != mx.bool_ or mask.shape != shape:
        raise ValueError(f"{name} must be boolean (True = valid) of shape {shape}, got {mask.dtype} {mask.shape}")


def expand_key_mask(name: str, mask: mx.array | None, shape: tuple[int, ...]) -> mx.array | None:
    """A mask of positions (B, S), True = attend, as attention takes it: (B, 1, 1, S). `shape` begins with B, S."""
    if mask is None:
        return None
    check_mask(name, mask, tuple(shape[:2]))
    return mask[:, None, None]
