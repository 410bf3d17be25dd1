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


def create_causal_mask(n: int, m: int | None = None, *, offset: int | None = None) -> np.ndarray:
    """Which of m keys each of n queries, the first at position `offset`, may see, (n, m): those up to its own position.
    By default there are n + offset keys, and the last query is at the last key."""
    m = n + (0 if offset is None else offset) if m is None else m
    first = m - n if offset is None else offset
    return np.array([[j <= first + i for j in range(m)] for i in range(n)], dtype=bool).reshape(n, m)


def padding_mask(lengths: Sequence[int] | np.ndarray, S: int) -> np.ndarray:
    """The keys within each sequence's length, (B, 1, 1, S)."""
    lengths = np.asarray(lengths)
    if np.any(lengths < 0) or np.any(lengths > S):
        raise ValueError(f"lengths must be between 0 and {S}, got {lengths.tolist()}")
    return np.arange(S)[None, None, None, :] < lengths[:, None, None, None]


def sliding_mask(L: int, S: int, window: int) -> np.ndarray:
    """The keys less than `window` positions away from each query, (L, S); the queries are the last L positions."""
    if window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    return np.abs(S - L + np.arange(L)[:, None] - np.arange(S)[None, :]) < window


def prefix_mask(L: int, S: int, lengths: int | Sequence[int] | np.ndarray) -> np.ndarray:
    """Causal, but the first `lengths` keys are seen by all: (L, S) for one length, (B, 1, L, S) for one per row."""
    if isinstance(lengths, int):
        return causal_mask(L, S) | (np.arange(S) < lengths)[None, :]
    return causal_mask(L, S) | padding_mask(lengths, S)


def segment_mask(queries: np.ndarray, keys: np.ndarray | None = None) -> np.ndarray:
    """The keys of each query's own segment, (B, 1, L, S), from ids (B, L) and (B, S); negative ids are padding."""
    keys = queries if keys is None else keys
    visible = np.zeros((queries.shape[0], 1, queries.shape[1], keys.shape[1]), dtype=bool)
    for b, i, j in np.ndindex(queries.shape[0], queries.shape[1], keys.shape[1]):
        visible[b, 0, i, j] = queries[b, i] == keys[b, j] and queries[b, i] >= 0
    return visible
