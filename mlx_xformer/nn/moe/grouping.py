"""Tokens in groups of rows of one expert each, so that a product has many rows, and back.

Axes: T tokens, E experts, k experts a token, n groups of b rows: E of them, in order ("dispatch"), or as many as it
takes ("blocks").
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import mlx.core as mx

from .routing import places


class Table(NamedTuple):
    """Which token each row of n groups of b holds, and where the choices of the tokens are.

    source (n b,): a token, or T for a row that holds none. place (T, k): a row, or n b where the expert was full, which
    `full` says can be. experts (n,): of the groups, None for those in order.
    """

    source: mx.array
    place: mx.array
    rows: int
    experts: mx.array | None
    full: bool


def dispatch(experts: mx.array, num_experts: int, rows: int) -> Table:
    """A group for each expert: `rows` of the choices (T, k), those of the first tokens."""
    place, _ = places(experts, num_experts)
    full = rows < len(experts)
    at = experts * rows + place
    if full:
        at = mx.where(place < rows, at, num_experts * rows)
    return Table(_source(at, num_experts * rows), at, rows, None, full)


def blocks(experts: mx.array, num_experts: int, rows: int) -> Table:
    """As many groups for each expert as its choices (T, k) fill; those at the end may hold none."""
    place, load = places(experts, num_experts)
    ends = mx.cumsum((load + (rows - 1)) // rows)  # (E,), in groups
    groups = num_groups(experts.size, num_experts, rows)
    at = mx.take(mx.concatenate([mx.zeros((1,), ends.dtype), ends[:-1]]) * rows, experts) + place
    which = mx.minimum((mx.arange(groups)[:, None] >= ends).sum(axis=1), num_experts - 1)
    return Table(_source(at, groups * rows), at, rows, which, False)


def num_groups(choices: int, num_experts: int, rows: int) -> int:
    """The most groups of so many rows that as many choices fill, at any load."""
    return (choices + min(choices, num_experts) * (rows - 1)) // rows


def _source(at: mx.array, size: int) -> mx.array:
    """(T, k) -> (size,): the inverse."""
    T, k = at.shape
    source = mx.full((size + 1,), T, mx.int32)
    source[mx.flatten(at)] = mx.flatten(mx.broadcast_to(mx.arange(T, dtype=mx.int32)[:, None], (T, k)))
    return source[:-1]


def _below(x: mx.array) -> mx.array:
    """x (R, C) with a row of zeros below."""
    return mx.concatenate([x, mx.zeros((1, x.shape[1]), x.dtype)])


@mx.custom_function
def _spread(x: mx.array, source: mx.array, place: mx.array) -> mx.array:
    return _below(x)[source]


@_spread.vjp
def _(primals, cotangent, _):
    x, source, place = primals
    return _below(cotangent)[place].sum(axis=1), mx.zeros_like(source), mx.zeros_like(place)


def spread(x: mx.array, table: Table) -> mx.array:
    """x (T, D) -> (n, b, D). The gradient gathers too: MLX's scatters go element by element on a CPU."""
    rows = cast(mx.array, _spread(x, table.source, table.place))
    return mx.unflatten(rows, 0, (-1, table.rows))


def _weighted(rows: mx.array, weights: mx.array) -> mx.array:
    return (rows * weights[..., None]).sum(axis=1)


@mx.custom_function
def _collect(y: mx.array, weights: mx.array, source: mx.array, place: mx.array) -> mx.array:
    return _weighted(y[place], weights)


@mx.custom_function
def _collect_kept(y: mx.array, weights: mx.array, source: mx.array, place: mx.array) -> mx.array:
    return _weighted(_below(y)[place], weights)


def _uncollect(primals: tuple[mx.array, ...], cotangent: mx.array, _: Any) -> tuple[mx.array, ...]:
    y, weights, source, place = primals
    at = mx.zeros((len(source) + 1,), weights.dtype)
    at[mx.flatten(place)] = mx.flatten(weights)
    by_y = _below(cotangent)[source] * at[:-1, None]
    by_weights = (_below(y)[place] * cotangent[:, None]).sum(axis=-1)
    return by_y.astype(y.dtype), by_weights, mx.zeros_like(source), mx.zeros_like(place)


_collect.vjp(_uncollect)
_collect_kept.vjp(_uncollect)


def collect(y: mx.array, weights: mx.array, table: Table) -> mx.array:
    """y (n, b, D), weights (T, k) -> (T, D): the weighted sums of what the tokens chose and found."""
    form = _collect_kept if table.full else _collect
    return cast(mx.array, form(mx.flatten(y, 0, 1), weights, table.source, table.place))
