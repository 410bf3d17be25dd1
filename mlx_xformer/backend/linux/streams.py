"""Streams of MLX that compute side by side on a CPU: one for each worker."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import lru_cache, partial

import mlx.core as mx

from . import blas


@lru_cache
def _streams() -> list[mx.ThreadLocalStream]:
    return [mx.new_thread_local_stream(mx.cpu) for _ in range(blas.workers - 1)]


def side_by_side(tasks: Sequence[Callable[[], mx.array]]) -> list[mx.array]:
    """Runs the tasks in parallel, in turn on the thread's own stream and those of the other workers; their results."""
    streams, out = [None, *_streams()], []
    for index, task in enumerate(tasks):
        stream = streams[index % len(streams)]
        with nullcontext() if stream is None else mx.stream(stream):
            out.append(task())
    return out


def by_rows(function: Callable[..., mx.array], *arrays: mx.array, step: int | None = None) -> mx.array:
    """function(*arrays), of stretches of axis 0, an equal one for each worker or else of `step`, side by side."""
    length = arrays[0].shape[0]
    step = -(-length // blas.workers) if step is None else step
    stretches = [slice(first, first + step) for first in range(0, length, step)]
    out = side_by_side([partial(lambda some: function(*(x[some] for x in arrays)), some) for some in stretches])
    return out[0] if len(out) == 1 else mx.concatenate(out)
