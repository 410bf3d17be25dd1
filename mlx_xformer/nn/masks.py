"""Boolean attention masks: True = attend, as in PyTorch's scaled_dot_product_attention.

Masks combine with `&`. Axes: B batch, L queries, S keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import mlx.core as mx
import numpy as np

Alignment = Literal["lower_right", "upper_left"]


def causal_mask(L: int, S: int, *, alignment: Alignment = "lower_right") -> mx.array:
    """(L, S) causal mask. "lower_right": the queries are the last L of the S positions, so a cache needs no offset;
    "upper_left": query i sees keys 0..i, PyTorch's `is_causal`."""
    if alignment not in ("lower_right", "upper_left"):
        raise ValueError(f'alignment must be "lower_right" or "upper_left", got {alignment!r}')
    offset = S - L if alignment == "lower_right" else 0
    return mx.arange(L)[:, None] + offset >= mx.arange(S)[None]


def create_causal_mask(n: int, m: int | None = None, *, offset: int | None = None) -> mx.array:
    """A lower-triangular mask: True where a query may attend to a key, which is at its own position or before.

    Args:
        n: Queries.
        m: Keys; by default the positions up to the last query, n of them without an offset.
        offset: The position of the first query; by default m - n, so that the last query is at the last key.

    Returns:
        Booleans (n, m).

    Raises:
        ValueError: A number is below 0.
    """
    m = n + (offset or 0) if m is None else m
    offset = m - n if offset is None else offset
    for name, value in (("n", n), ("m", m), ("offset", offset)):
        if value < 0:
            raise ValueError(f"{name} must be at least 0, got {value}")
    return mx.arange(n)[:, None] + offset >= mx.arange(m)[None]


def padding_mask(lengths: Sequence[int] | np.ndarray | mx.array, S: int) -> mx.array:
    """(B, 1, 1, S) mask that keeps the first lengths[b] keys of each row. ValueError for a length outside 0 .. S, but
    for those of an mx.array, which is not read back."""
    if not isinstance(lengths, mx.array):
        known = np.asarray(lengths)
        if known.ndim != 1 or not ((known >= 0) & (known <= S)).all():
            raise ValueError(f"lengths must be from 0 to S = {S}, got {known.tolist()}")
        lengths = mx.array(known)
    return (mx.arange(S)[None] < lengths[:, None])[:, None, None]


def sliding_mask(L: int, S: int, window: int) -> mx.array:
    """(L, S) mask of the keys less than `window` positions away, to either side; `& causal_mask(L, S)` leaves the last
    `window` keys, the query's own among them. The queries are the last L of the S positions. ValueError below 1."""
    if window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    return mx.abs(mx.arange(L)[:, None] + (S - L) - mx.arange(S)[None]) < window


def prefix_mask(L: int, S: int, lengths: int | Sequence[int] | np.ndarray | mx.array) -> mx.array:
    """Prefix-LM: every query sees the first `lengths` keys, and causally the rest (the queries are the last L of the S
    positions). (L, S) for one length, (B, 1, L, S) for one per row."""
    if isinstance(lengths, (int, np.integer)):
        return causal_mask(L, S) | padding_mask([lengths], S)[0, 0]
    return causal_mask(L, S) | padding_mask(lengths, S)


def segment_mask(queries: mx.array, keys: mx.array | None = None) -> mx.array:
    """Packed sequences: (B, 1, L, S) mask of the keys whose segment id (B, S) is the query's (B, L), block-diagonal.
    Negative ids are padding, which sees nothing and is not seen. keys defaults to queries."""
    keys = queries if keys is None else keys
    if queries.ndim != 2 or keys.ndim != 2 or queries.shape[0] != keys.shape[0]:
        raise ValueError(f"segment ids must be (batch, length) of one batch, got {queries.shape} and {keys.shape}")
    same = queries[:, :, None] == keys[:, None]
    return (same & (queries >= 0)[:, :, None])[:, None]
