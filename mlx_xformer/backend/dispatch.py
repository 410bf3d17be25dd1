"""Chooses the form of an operation for the device, and divides work among the workers of a CPU.

Where MLX's CPU backend can compile (Linux with g++), float32 arrays are computed by the functions of `linux`. Each of
them has a plain form, which other devices use and whose gradient it takes.
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
    """Whether x is computed by the functions of linux.chains: float32, on a CPU, with a compiler."""
    return _FUSES and x.dtype == mx.float32 and on_cpu()


def by_rows(function: Callable[[mx.array], mx.array], x: mx.array, columns: int = 0) -> mx.array:
    """function(x) for a function of each x[i] alone.

    On a CPU, stretches of axis 0 are computed in parallel where x, or its product with so many columns, is large.
    """
    if blas.workers == 1 or not on_cpu() or (x.size < _LARGE and x.size * columns < _MANY):
        return function(x)
    return streams.by_rows(function, x)


def side_by_side(tasks: Sequence[Callable[[], mx.array]]) -> list[mx.array]:
    """Returns what each task returns; on a CPU with several workers, tasks are computed in parallel."""
    if blas.workers == 1 or not on_cpu():
        return [task() for task in tasks]
    return streams.side_by_side(tasks)


_LARGE, _MANY = 2**17, 2**23  # numbers, and multiplications, from which on work is divided among the workers


def fuse(chain: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """Compiles an elementwise chain into one kernel. Empty arrays skip it, since MLX 0.32.4 divides by 0 on CUDA."""
    compiled = cast(Callable[..., mx.array], mx.compile(chain, shapeless=True))

    def call(*arrays: mx.array) -> mx.array:
        return (compiled if all(x.size for x in arrays) else chain)(*arrays)

    return call


def with_gradient_of(plain: Callable[..., mx.array]) -> Callable[[Callable], Callable[..., mx.array]]:
    """Decorates a fast form of `plain`: its gradient is computed from `plain`."""

    def decorate(fast: Callable[..., mx.array]) -> Callable[..., mx.array]:
        function = mx.custom_function(fast)

        @function.vjp
        def gradient(primals, cotangent, _):
            several = isinstance(primals, (tuple, list))
            gradients = mx.vjp(plain, list(primals) if several else [primals], [cotangent])[1]
            return tuple(gradients) if several else gradients[0]

        return cast(Callable[..., mx.array], function)

    return decorate
