"""Channels to heads and back, and key/value heads for every query head.

Axes: L positions, H heads, G key/value heads, D width of a head. A batch axis may stand before the others.
"""

from __future__ import annotations

import mlx.core as mx


def reshape_to_heads(x: mx.array, num_heads: int) -> mx.array:
    """Cuts the channels of each position into heads.

    Args:
        x: (L, H * D) or (B, L, H * D).
        num_heads: H.

    Returns:
        (H, L, D) or (B, H, L, D).

    Raises:
        ValueError: x has other axes, or num_heads does not divide its channels.
    """
    if x.ndim not in (2, 3):
        raise ValueError(f"x must be (length, channels) or (batch, length, channels), got shape {x.shape}")
    if num_heads < 1 or x.shape[-1] % num_heads:
        raise ValueError(f"num_heads must divide the channels of x, {x.shape[-1]}, got {num_heads}")
    return mx.unflatten(x, -1, (num_heads, x.shape[-1] // num_heads)).swapaxes(-2, -3)  # (..., L, H, D) before


def transpose_heads_to_2d(x: mx.array) -> mx.array:
    """Joins the heads of each position to channels: the inverse of reshape_to_heads.

    Args:
        x: (H, L, D) or (B, H, L, D).

    Returns:
        (L, H * D) or (B, L, H * D).

    Raises:
        ValueError: x has other axes.
    """
    if x.ndim not in (3, 4):
        raise ValueError(f"x must be (heads, length, dim) or (batch, heads, length, dim), got shape {x.shape}")
    return mx.flatten(x.swapaxes(-2, -3), -2, -1)  # (..., L, H, D) before


def repeat_kv(x: mx.array, group_size: int) -> mx.array:
    """Repeats each key/value head for the query heads that read it: head h of the result is head h // group_size.

    attention() needs no repeated heads; this is for code that does. Its gradient is the sum over each group.

    Args:
        x: (G, S, D) or (B, G, S, D).
        group_size: Query heads for each key/value head.

    Returns:
        (G * group_size, S, D) or (B, G * group_size, S, D); x itself for a group_size of 1.

    Raises:
        ValueError: x has other axes, or group_size is below 1.
    """
    if x.ndim not in (3, 4):
        raise ValueError(f"x must be (heads, length, dim) or (batch, heads, length, dim), got shape {x.shape}")
    if type(group_size) is not int or group_size < 1:
        raise ValueError(f"group_size must be a whole number from 1, got {group_size!r:.80}")
    return x if group_size == 1 else mx.repeat(x, group_size, axis=-3)
