"""What models check of their inputs where they come in."""

from __future__ import annotations

from typing import Any

import mlx.core as mx


def check_tokens(name: str, tokens: mx.array, size: int) -> None:
    """ValueError unless tokens are (batch, length) whole numbers below `size`: MLX reads beyond a table without a
    word. What a compilation traces has no values yet, and is not read."""
    if tokens.ndim != 2 or not mx.issubdtype(tokens.dtype, mx.integer):
        raise ValueError(f"{name} must be (batch, length) whole numbers, got shape {tokens.shape} {tokens.dtype}")
    if not tokens.size:
        return
    try:
        ends: list[Any] = [tokens.min().item(), tokens.max().item()]
    except (ValueError, RuntimeError):  # of a compilation
        return
    wrong = [end for end in ends if not 0 <= end < size]
    if wrong:
        raise ValueError(f"{name} must be from 0 to {size - 1}, got {wrong[0]}")


def check_mask(name: str, mask: mx.array, shape: tuple[int, ...]) -> None:
    """ValueError unless a mask is boolean and of this shape."""
    if mask.dtype != mx.bool_ or mask.shape != shape:
        raise ValueError(f"{name} must be boolean (True = valid) of shape {shape}, got {mask.dtype} {mask.shape}")
