"""Products and attention for MLX's Linux CPU backend, in pieces that its workers compute side by side."""

from __future__ import annotations

from functools import lru_cache, partial

import mlx.core as mx

from . import blas
from .chains import add_gate, dense, exp_below_0, glu
from .streams import by_rows, side_by_side

_UNCOPIED = (10**6, 1200)  # multiplications and results of a product up to which OpenBLAS copies no operand (AVX-512)


# Numbers of a matrix that are worth a worker: few where each is copied for a product, at a nanosecond or so.
_SHARE = 2**18 if blas.copies else 2**20
_LARGE_ONE_ROW = 2**22 if blas.one_row else _SHARE  # the same for one row, for which cblas_sgemv copies nothing


_LEAST = 32  # rows of a piece


def few_rows(x: mx.array, weight: mx.array, bias: mx.array | None = None) -> mx.array:
    """x weight^T + bias, (M, I), (O, I), (O,) -> (M, O), for small M: one product, or one for each of equal pieces of
    the weight, which the workers share where it is large."""
    M = len(x)
    if M == 1 and blas.one_row and weight.size < 2 * _LARGE_ONE_ROW:  # a step of generation has some hundred of these
        return x @ weight.T if bias is None else mx.addmm(bias[None], x, weight.T)
    O, I = weight.shape
    workers = max(1, min(blas.workers, weight.size // (_LARGE_ONE_ROW if M == 1 else _SHARE)))
    most = O // workers
    if not (M == 1 and blas.one_row):
        most = min(most, _UNCOPIED[0] // (M * I), _UNCOPIED[1] // M)
    size = _divisor(O, max(1, most))
    if size < _LEAST or size == O:
        y = x @ weight.T
    else:
        pieces = weight.reshape(-1, size, I).swapaxes(1, 2)  # (n, I, size)
        y = x @ pieces if workers == 1 else by_rows(lambda some: x @ some, pieces)  # (n, M, size)
        y = (y if M == 1 else y.swapaxes(0, 1)).reshape(M, O)
    return y if bias is None else y + bias


@lru_cache(maxsize=256)
def _divisor(n: int, most: int) -> int:
    """The largest divisor of n that is at most `most`."""
    return next(size for size in range(min(n, most), 0, -1) if n % size == 0)


_PATCHES = 2**20  # elements of the patches that a block of frames holds at once


_ROWS = 2**10  # and the least rows of its product


def conv_glu(x: mx.array, weight: mx.array, bias: mx.array) -> mx.array:
    """See kernels.conv_glu: products with blocks of patches, which stay in the cache."""
    if weight.ndim == 2:
        return _rows_of(x, by_rows(lambda rows: glu(rows @ weight.T, bias), mx.flatten(x, 0, -2)))
    if weight.ndim == 3:
        return conv_glu(x[:, :, None], weight[:, :, None], bias)[:, :, 0]
    O, K, L, C = weight.shape
    B, T, F, _ = x.shape
    x = mx.contiguous(mx.pad(x, [(0, 0), (K // 2, K // 2), (L // 2, L // 2), (0, 0)]))
    weight = weight.reshape(O, -1).T
    frames = -(-max(_ROWS, _PATCHES // (K * L * C)) // F)
    row = x.shape[2] * C
    out = [
        by_rows(
            lambda some: glu(dense(some).reshape(-1, K * L * C) @ weight, bias).reshape(-1, F, O // 2),
            mx.as_strided(x, (T, F, K, L * C), (row, C, row, 1), b * x.shape[1] * row),
            step=frames,
        )
        for b in range(B)
    ]
    return mx.stack(out)


def _rows_of(x: mx.array, rows: mx.array) -> mx.array:
    """(R, C) -> (..., C), as x (..., K) has its rows."""
    return rows.reshape(*x.shape[:-1], rows.shape[-1])


_SCORES = 2**20  # scores that a block of rows holds at once


def attention(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
    """softmax(q k^T) v, (B, H, L, D), by heads and blocks of rows whose scores stay in the cache."""
    B, H, L, _ = q.shape
    S = k.shape[2]
    # A column of ones beside the values brings the sum of the weights out of the same product.
    v = mx.concatenate([v, mx.ones((*v.shape[:-1], 1))], axis=-1)
    q, k, v = (mx.contiguous(mx.flatten(x, 0, 1)) for x in (q, k, v))  # once, or every product copies them
    rows = max(16, min(L, _SCORES // S))
    heads = max(1, min(_SCORES // (rows * S), -(-B * H // blas.workers)))

    def block(some: slice, part: slice) -> mx.array:
        scores = q[some, part] @ k[some].swapaxes(-1, -2)
        weighted = exp_below_0(scores - scores.max(axis=-1, keepdims=True)) @ v[some]
        return mx.flatten(weighted[..., :-1] / weighted[..., -1:], 0, 1)

    tasks = [
        partial(block, slice(head, head + heads), slice(row, row + rows))
        for head in range(0, B * H, heads)
        for row in range(0, L, rows)
    ]
    return mx.concatenate(side_by_side(tasks)).reshape(B, H, L, -1)


_STEPS = 64  # of a sum of products that one product may take in sequence


def products(x: mx.array) -> mx.array:
    """(B, T, ..., H) -> (B, n, R, H, H), R the product of the axes between: x^T x over n stretches of T."""
    x = x.reshape(*x.shape[:2], -1, x.shape[-1])
    x = mx.pad(x, [(0, 0), (0, -x.shape[1] % _STEPS), (0, 0), (0, 0)])
    x = mx.contiguous(mx.unflatten(x, 1, (-1, _STEPS)).swapaxes(2, 3))  # (B, n, R, _STEPS, H)
    return x.swapaxes(-1, -2) @ x


def add_gated_products(residual: mx.array, x: mx.array, value: mx.array, gate: mx.array) -> mx.array:
    """residual + (x value) * sigmoid(x gate), of rows: (R, C), (R, K) and two of (K, C) -> (R, C)."""
    step = -(-len(x) // (4 * blas.workers))
    return by_rows(lambda residual, x: add_gate(residual, x @ value, x @ gate), residual, x, step=step)
