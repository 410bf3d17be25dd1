"""How many slots and bytes a cache takes. Both follow from the longest length it has had."""

from __future__ import annotations

from functools import lru_cache

import mlx.core as mx

from .quantized import BITS, group_size, stored_width

STEP = 256  # slots come in multiples of it: cuDNN's decode kernels ask for that


def lost(longest: int, window: int | None, slack: int) -> int:
    """The first positions that no query can see any more, not even after a rewind by the slack."""
    return 0 if window is None else max(0, longest - window + 1 - slack)


@lru_cache(maxsize=4096)
def slots(
    longest: int, window: int | None, keep: int, slack: int, capacity: int | None = None, padding: int = 0
) -> int:
    """Slots of a cache that has held `longest` positions, of which `padding` are padding in its emptiest row.

    They grow by a quarter at a time, or are all of `capacity` from the first.
    """
    if not longest:
        return 0
    size = STEP if capacity is None else -(-capacity // STEP) * STEP
    while size < longest:
        size += max(STEP, size // 4 // STEP * STEP)
    if window is None or (keep and lost(longest, window, slack) <= keep + padding):
        return size
    room = max(STEP, (window + slack) // 4)  # for what is appended before the line is renewed
    return min(size, -(-(keep + window + slack + room) // STEP) * STEP)


def cache_bytes(
    length: int,
    *,
    num_kv_heads: int,
    head_dim: int,
    value_dim: int | None = None,
    dtype: mx.Dtype = mx.float32,
    window: int | None = None,
    keep: int = 0,
    slack: int = 0,
    bits: int | None = None,
    capacity: int | None = None,
    batch: int = 1,
    layers: int = 1,
) -> int:
    """The nbytes of `layers` KVCaches that have held up to `length` positions of a batch without padding.

    value_dim is head_dim by default; dtype is that of the keys and values appended.
    """
    least: dict[str, tuple[int | None, int]] = {"length": (length, 0), "num_kv_heads": (num_kv_heads, 1)}
    least |= {"head_dim": (head_dim, 1), "batch": (batch, 1)}
    least |= {"window": (window, 1), "keep": (keep, 0), "slack": (slack, 0), "capacity": (capacity, max(1, length))}
    for name, (value, lowest) in least.items():
        if value is not None and value < lowest:
            raise ValueError(f"{name} must be at least {lowest}, got {value}")
    if bits is not None and bits not in BITS:
        raise ValueError(f"bits must be None or one of {', '.join(map(str, BITS))}, got {bits}")
    kept = keep if lost(length, window, slack) > keep else 0
    positions = slots(length, window, keep, slack, capacity) + kept
    widths = (head_dim, head_dim if value_dim is None else value_dim)
    return layers * batch * num_kv_heads * positions * sum(_bytes(width, dtype, bits) for width in widths)


def _bytes(width: int, dtype: mx.Dtype, bits: int | None) -> int:
    """Of one head of one position."""
    if bits is None:
        return width * dtype.size
    return stored_width(width) * bits // 8 + 2 * dtype.size * stored_width(width) // group_size(width)
