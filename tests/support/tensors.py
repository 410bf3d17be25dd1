"""Tensors that tests draw and compare."""

import mlx.core as mx
import numpy as np


def same_tensors(a, b):
    assert a.keys() == b.keys()
    for name, x in a.items():
        y = b[name]
        assert x.shape == y.shape and x.dtype == y.dtype, name
        assert mx.array_equal(mx.view(x, mx.uint8), mx.view(y, mx.uint8)), name


def signal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape) * 1.7 + 0.4
