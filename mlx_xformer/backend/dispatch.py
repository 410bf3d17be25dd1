"""Which form of an operation serves an array on the device at hand, and rows of work shared out among a CPU's workers.

Where MLX's CPU backend can compile (Linux with g++), float32 arrays take the forms of `linux`. Each has a plain form,
which other devices take and whose gradient it has.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Sequence
from typing import cast

import mlx.core as mx

from .linux import blas, streams

_FUSES = sys.platform == "linux" and shutil.which("g++") is not None and "MLX_DISABLE_COMPILE" not in os.environ
HAS_CUDA = mx.cuda.is_available()
_CPU = mx.Device(mx.cpu)


def on_cpu() -> bool:
    """Whether MLX's default device is a CPU."""
    return mx.default_device() == _CPU


def vectorizes(x: mx.array) -> bool:
    """Whether the forms of linux.chains serve x: float32, on a CPU whose built-in functions are scalar calls."""
    return _FUSES and x.dtype == mx.float32 and on_cpu()


def by_rows(function: Callable[[mx.array], mx.array], x: mx.array, columns: int = 0) -> mx.array:
    """function(x) for a function of each x[i] alone.

    On a CPU, stretches of axis 0 are computed in parallel where x, or its product with so many columns, is large.
    """
    if blas.workers == 1 or not on_cpu() or (x.size < _LARGE and x.size * columns < _MANY):
        return function(x)
    return streams.by_rows(function, x)


def side_by_side(tasks: Sequence[Callable[[], mx.array]]) -> list[mx.array]:
    """What each task returns; on a CPU with several workers they run at the same time."""
    if blas.workers == 1 or not on_cpu():
        return [task() for task in tasks]
    return streams.side_by_side(tasks)


_LARGE, _MANY = 2**17, 2**23  # numbers, and multiplications, that are worth a meeting of workers


def fuse(chain: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """The elementwise chain in one kernel. Arrays without elements go around it: MLX 0.32.4 divides by 0 on CUDA."""
    compiled = cast(Callable[..., mx.array], mx.compile(chain, shapeless=True))

    def call(*arrays: mx.array) -> mx.array:
        return (compiled if all(x.size for x in arrays) else chain)(*arrays)

    return call


def with_gradient_of(plain: Callable[..., mx.array]) -> Callable[[Callable], Callable[..., mx.array]]:
    """Marks a fast form as equal to `plain`, whose derivative it takes."""

    def decorate(fast: Callable[..., mx.array]) -> Callable[..., mx.array]:
        function = mx.custom_function(fast)

        @function.vjp
        def gradient(primals, cotangent, _):
            several = isinstance(primals, (tuple, list))
            gradients = mx.vjp(plain, list(primals) if several else [primals], [cotangent])[1]
            return tuple(gradients) if several else gradients[0]

        return cast(Callable[..., mx.array], function)

    return decorate
