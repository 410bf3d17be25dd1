"""One layer's cache: appends at 1k and at 4k; a chunk of prefill and steps of decode at 8k, in float16 and in 8
bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from cases.common import describe_ours
from mlx_xformer import KVCache, cache_bytes
from mlx_xformer.backend import device
from mlx_xformer.nn.attention.core import attention

mx = device.mx

HEADS, KV_HEADS, WIDTH = 8, 2, 64
CONTEXT, CHUNK, STEPS, APPENDS = 8192, 512, 16, 256
PAIRS = {  # part: (the base, what is compared with it), functions below
    "append": ("append_at_1k", "append_at_4k"),
    "prefill at 8k": ("prefill_float16", "prefill_8_bits"),
    "decode at 8k": ("decode_float16", "decode_8_bits"),
}


def draw(heads: int, n: int, dtype: Any) -> Any:
    """Normal numbers, (1, heads, n, WIDTH)."""
    x = np.random.default_rng(n).standard_normal((1, heads, n, WIDTH)).astype(np.float32)
    return mx.array(x).astype(dtype)


def case(run: Callable[[], None]) -> dict[str, Any]:
    """What bench/worker.py wants; the peak is that of the runs."""
    mx.clear_cache()
    mx.reset_peak_memory()
    return {**describe_ours(run), "peak": lambda: max(mx.get_peak_memory(), mx.get_active_memory())}


def held_bytes(function: str) -> int:
    """What the cache of a case holds at its end."""
    sizes: dict[str, Any] = {"num_kv_heads": KV_HEADS, "head_dim": WIDTH}
    if function.startswith("append"):
        return cache_bytes((1024 if function.endswith("1k") else 4096) + APPENDS, **sizes)
    return cache_bytes(CONTEXT, **sizes, dtype=mx.float16, bits=8 if function.endswith("8_bits") else None)


def filled(length: int, dtype: Any, bits: int | None = None) -> KVCache:
    """A cache of `length` positions."""
    cache = KVCache(bits=bits)
    cache.append(draw(KV_HEADS, length, dtype), draw(KV_HEADS, length, dtype))
    mx.eval(cache.arrays)
    return cache


def append_at(length: int) -> dict[str, Any]:
    """APPENDS of one position each, without attention, then back to `length`."""
    cache, new = filled(length, mx.float32), draw(KV_HEADS, 1, mx.float32)
    mx.eval(new)

    def run() -> None:
        for _ in range(APPENDS):
            cache.append(new, new)
            mx.eval(cache.arrays)
        cache.trim(APPENDS)

    return case(run)


def attend(n: int, repeats: int, bits: int | None) -> dict[str, Any]:
    """`repeats` times n new positions that end at CONTEXT or just after, and their attention, in float16."""
    cache = filled(CONTEXT - n, mx.float16, bits)
    q, k, v = (draw(heads, n, mx.float16) for heads in (HEADS, KV_HEADS, KV_HEADS))
    mx.eval(q, k, v)

    def run() -> None:
        for _ in range(repeats):
            view = cache.append(k, v)
            out = attention(q, view.keys, view.values, **view.options)
            del view
            mx.eval(out, cache.arrays)
        cache.trim(n * repeats)

    return case(run)


def append_at_1k(_: Path) -> dict[str, Any]:
    return append_at(1024)


def append_at_4k(_: Path) -> dict[str, Any]:
    return append_at(4096)


def prefill_float16(_: Path) -> dict[str, Any]:
    return attend(CHUNK, 1, None)


def prefill_8_bits(_: Path) -> dict[str, Any]:
    return attend(CHUNK, 1, 8)


def decode_float16(_: Path) -> dict[str, Any]:
    return attend(1, STEPS, None)


def decode_8_bits(_: Path) -> dict[str, Any]:
    return attend(1, STEPS, 8)
