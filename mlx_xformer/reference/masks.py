"""Boolean attention masks: True = attend. Axes: B batch, L queries, S keys."""

from collections.abc import Sequence

import numpy as np


def causal_mask(L: int, S: int, *, alignment: str = "lower_right") -> np.ndarray:
    """Which of S keys each of L queries may see, (L, S): those up to its own position.

    "lower_right": the queries are the last L positions. "upper_left": they are the first L.
    """
    if alignment not in ("lower_right", "upper_left"):
        raise ValueError(f"alignment must be 'lower_right' or 'upper_left', got {alignment!r}")
    first = S - L if alignment == "lower_right" else 0
    return np.arange(S)[None, :] <= first + np.arange(L)[:, None]


def padding_mask(lengths: Sequence[int] | np.ndarray, S: int) -> np.ndarray:
    """The keys within each sequence's length, (B, 1, 1, S)."""
    lengths = np.asarray(lengths)
    if np.any(lengths < 0) or np.any(lengths > S):
        raise ValueError(f"lengths must be between 0 and {S}, got {lengths.tolist()}")
    return np.arange(S)[None, None, None, :] < lengths[:, None, None, None]
