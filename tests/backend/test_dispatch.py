"""Rows that several streams compute side by side."""

from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import numpy as np

from mlx_xformer.backend import dispatch
from mlx_xformer.backend.linux import blas, streams
from mlx_xformer.backend.threads import clear_streams_at_thread_end


def test_rows_are_computed_side_by_side(monkeypatch):
    """Several workers, a number that does not divide the rows, from a thread other than the importing one: forward and
    gradient are those of one."""
    x, weight = mx.random.normal((7, 13, 5)), mx.random.normal((5, 5))
    mx.eval(x, weight)

    def call(x):
        return dispatch.by_rows(lambda rows: mx.tanh(rows @ weight) + rows, x)

    def both():
        out, gradient = mx.vjp(call, [x], [mx.cos(x)])
        mx.eval(out, gradient)
        return np.array(out[0]), np.array(gradient[0])

    alone = both()
    monkeypatch.setattr(blas, "workers", 3)
    monkeypatch.setattr(dispatch, "_LARGE", 0)
    streams._streams.cache_clear()
    try:
        with ThreadPoolExecutor(1, initializer=clear_streams_at_thread_end) as pool:
            for result in (both(), pool.submit(both).result()):
                assert all(np.allclose(a, b, atol=1e-6) for a, b in zip(alone, result, strict=True))
    finally:
        streams._streams.cache_clear()
