"""What models check of their inputs where they come in."""

from __future__ import annotations

from typing import Any

import mlx.core as mx


def check_tokens(name: str, tokens: mx.array, size: int | None = None) -> None:
    """ValueError unless tokens are (batch, length) whole numbers, below `size` if it is given: MLX reads beyond a table
    without a word. Without a size they are not read, as MLX would have to wait for them; nor is what a compilation
    traces, which has no values yet."""
    if tokens.ndim != 2 or not mx.issubdtype(tokens.dtype, mx.integer):
        raise ValueError(f"{name} must be (batch, length) whole numbers, got shape {tokens.shape} {tokens.dtype}")
    if size is None or not tokens.size:
        return
    try:
        ends: list[Any] = [tokens.min().item(), tokens.max().item()]
    except (ValueError, RuntimeError):  # of a compilation
        return
    wrong = [end for end in ends if not 0 <= end < size]
    if wrong:
        raise ValueError(f"{name} must be from 0 to {size - 1}, got {wrong[0]}")


def check_vectors(name: str, x: mx.array, width: int) -> None:
    """ValueError unless x is (batch, length, width) of floats."""
    if x.ndim != 3 or x.shape[-1] != width or not mx.issubdtype(x.dtype, mx.floating):
        raise ValueError(f"{name} must be (batch, length, {width}) of floats, got {x.dtype} {x.shape}")


def check_mask(name: str, mask: mx.array, shape: tuple[int, ...]) -> None:
    """ValueError unless a mask is boolean and of this shape."""
    if mask.dtype != mx.bool_ or mask.shape != shape:
        raise ValueError(f"{name} must be boolean (True = valid) of shape {shape}, got {mask.dtype} {mask.shape}")


def key_mask(name: str, mask: mx.array | None, shape: tuple[int, ...]) -> mx.array | None:
    """A mask of positions (B, S), True = attend, as attention takes it: (B, 1, 1, S). `shape` begins with B, S."""
    if mask is None:
        return None
    check_mask(name, mask, tuple(shape[:2]))
    return mask[:, None, None]
