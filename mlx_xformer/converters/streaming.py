"""Tensors that are read, changed and passed on one by one, so that a conversion takes little memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import mlx.core as mx

from ..storage.messages import describe_misfits
from .formats.source import scan
from .precision import Repacking
from .rules import Move, Shape
from .stored import StoredTensor

Progress = Callable[[int, int], None]  # of the number of tensors written, and of all


def stream_moves(
    moves: Sequence[Move],
    tensors: Mapping[str, StoredTensor],
    shapes: Mapping[str, Shape],
    repack: Repacking | None = None,
    warnings: list[str] | None = None,
) -> Iterator[tuple[str, mx.array]]:
    """What the moves make of the tensors, one at a time or, to repack them, the tensors of a layer at a time.

    Args:
        moves: The rules at work, see rules.plan.
        tensors: Their sources.
        shapes: Of the targets, for messages.
        repack: Applied to whole layers.
        warnings: Grows by a line for every tensor read with values that look wrong.
    """
    for group in [[move] for move in moves] if repack is None else _group_by_layer(moves):
        made: dict[str, mx.array] = {}
        for move in group:
            arrays = [tensors[name].read() for name in move.sources] if move.targets else []
            if warnings is not None:
                warnings += scan(dict(zip(move.sources, arrays, strict=False)))
            try:
                made |= zip(move.targets, move(arrays), strict=True)
            except ValueError as error:
                failure = move.describe_failure(error, arrays, shapes)
                raise ValueError(describe_misfits([("misshapen", failure)])) from None
            del arrays
        made = made if repack is None else repack(made)
        for name in list(made):
            yield name, made.pop(name)
        mx.clear_cache()  # of buffers that fit no other layer


def as_blanks(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Tensors of the same shapes and dtypes that are never read."""
    return {name: StoredTensor(x.dtype, x.shape, x.blank) for name, x in tensors.items()}


def _group_by_layer(moves: Sequence[Move]) -> list[list[Move]]:
    """The moves whose targets are parts of the same layers, in the order of their first."""
    groups: list[list[Move]] = []
    group_of: dict[str, list[Move]] = {}
    for move in moves:
        layers = list(dict.fromkeys(name.rpartition(".")[0] for name in move.targets))
        found = next((group_of[layer] for layer in layers if layer in group_of), None)
        if found is None:
            groups.append(found := [])
        for layer in layers:
            other = group_of.setdefault(layer, found)
            if other is not found:
                found += other
                other.clear()
                group_of |= {name: found for name, group in group_of.items() if group is other}
        found.append(move)
    return [group for group in groups if group]


def count_written(
    arrays: Iterator[tuple[str, mx.array]], total: int, progress: Progress | None
) -> Iterator[tuple[str, mx.array]]:
    """The arrays. Each that is asked for means that those before it have been written, which `progress` is told."""
    for done, pair in enumerate(arrays):
        if progress is not None:
            progress(done, total)
        yield pair
    if progress is not None:
        progress(total, total)


def name_errors(path: Path, arrays: Iterator[tuple[str, mx.array]]) -> Iterator[tuple[str, mx.array]]:
    """The arrays; a ValueError begins with the path, as those of reading do already."""
    try:
        yield from arrays
    except ValueError as error:
        message = str(error)
        raise ValueError(message if message.startswith(f"{path}") else f"{path}: {message}") from None
