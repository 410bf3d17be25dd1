"""Boolean attention masks: True = attend, as in PyTorch's scaled_dot_product_attention.

Masks combine with `&`. Axes: B batch, L queries, S keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import mlx.core as mx

Alignment = Literal["lower_right", "upper_left"]


def causal_mask(L: int, S: int, *, alignment: Alignment = "lower_right") -> mx.array:
    """(L, S) causal mask. "lower_right": the queries are the last L of the S positions, so a cache needs no offset;
    "upper_left": query i sees keys 0..i, PyTorch's `is_causal`."""
    if alignment not in ("lower_right", "upper_left"):
        raise ValueError(f'alignment must be "lower_right" or "upper_left", got {alignment!r}')
    offset = S - L if alignment == "lower_right" else 0
    return mx.arange(L)[:, None] + offset >= mx.arange(S)[None]


def padding_mask(lengths: Sequence[int] | mx.array, S: int) -> mx.array:
    """(B, 1, 1, S) mask that keeps the first lengths[b] keys of each row. ValueError for a length outside 0 .. S, where
    lengths is a sequence (an array is not read back)."""
    if isinstance(lengths, Sequence) and not all(0 <= length <= S for length in lengths):
        raise ValueError(f"lengths must be from 0 to S = {S}, got {list(lengths)}")
    return (mx.arange(S)[None] < mx.array(list(lengths) if isinstance(lengths, Sequence) else lengths)[:, None])[
        :, None, None
    ]
