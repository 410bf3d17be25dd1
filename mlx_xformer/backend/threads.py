"""What a thread owes MLX before it ends."""

from __future__ import annotations

import threading

import mlx.core as mx

_thread = threading.local()  # freed when its thread ends


class _End:
    def __del__(self) -> None:
        mx.clear_streams()


def clear_streams_at_thread_end() -> None:
    """Frees the streams that MLX makes for the calling thread when that thread ends.

    Call it at the start of every thread of yours that computes, or pass it to a `ThreadPoolExecutor` as its
    `initializer`. Without it a process on Linux may abort when it exits, with code 134 and "terminate called without an
    active exception", though all its work is done. Arrays that the thread hands to others must have been evaluated:
    `mx.eval()` or `np.array()`, as what `generate`, `batch_generate` and `Separator` return has been.
    """
    _thread.end = _End()
