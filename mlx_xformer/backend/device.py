"""The device, its memory, and on Linux the BLAS and the allocator that MLX uses.

Importing this module does three things, once. On Linux it loads OpenBLAS before MLX, if the system has it, and compiles
a small library for products of one row (50 ms; see linux/blas.py). With glibc it lets the process keep memory that it
has freed. And it limits MLX's cache of freed buffers. Each can be turned off (MLX_XFORMER_BLAS=0, MLX_XFORMER_MALLOC=0,
set_cache_limit), and none overrides a setting of OpenBLAS or glibc in the environment.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import cast

from .linux.blas import words as blas
from .linux.blas import workers

_LAUNCHED = ("MLX_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")  # variables that a launcher sets
_CACHE_FRACTION = 8  # MLX may keep an eighth of the memory in freed buffers


def _keep_freed_memory() -> bool:
    """Lets glibc take large blocks from its heap and keep them when freed; returns whether it does.

    By default each block of 32 MB or more is mapped and unmapped, and the kernel zeroes its pages every time: a million
    page faults, a third of the time of an HTDemucs segment. What stays is bounded by the process's own peak.
    """
    if sys.platform != "linux" or os.environ.get("MLX_XFORMER_MALLOC") == "0":
        return False
    if "GLIBC_TUNABLES" in os.environ or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    try:
        library = ctypes.CDLL(None)
        library.gnu_get_libc_version  # noqa: B018  (elsewhere the options below mean nothing)
        return all(library.mallopt(option, value) for option, value in _MALLOPT)
    except (OSError, AttributeError):
        return False


_MALLOPT = ((-3, 1 << 30), (-1, 1 << 30), (-2, 1 << 26))  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_TOP_PAD, in bytes
keeps_memory = _keep_freed_memory()

backend_error: str | None = None
try:
    import mlx.core as mx
except ImportError:
    backend_error = (
        "MLX has no backend on this machine: install one of mlx-xformer[cpu], mlx-xformer[cuda12] or "
        "mlx-xformer[cuda13] (on macOS: pip install --force-reinstall mlx)"
    )


@dataclass(frozen=True)
class DeviceReport:
    """The device and the libraries in use. Sizes are in bytes.

    Attributes:
        device: "cpu" or "gpu".
        name: of the processor or GPU.
        memory: that the device can use.
        cache_limit: the most that MLX keeps in freed buffers.
        blas: the BLAS in use, in words.
        mlx: the version of MLX.
        workers: streams that compute in parallel on a CPU.
    """

    device: str
    name: str
    memory: int
    cache_limit: int
    blas: str
    mlx: str
    workers: int = 1


def total_memory() -> int:
    """Bytes of memory the default device can use (unified memory on a Mac, RAM on the CPU)."""
    if mx.default_device() == mx.Device(mx.gpu):
        info = mx.device_info()
        return int(info.get("memory_size") or info.get("total_memory") or _system_memory())
    return _system_memory()


def _system_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def set_cache_limit(limit: int | None = None) -> int:
    """Limits MLX's cache of freed buffers.

    Args:
        limit: in bytes; by default an eighth of the memory.

    Returns:
        The limit in bytes.

    Raises:
        ValueError: if the limit is below 0.
    """
    if limit is None:
        limit = total_memory() // _CACHE_FRACTION
    if limit < 0:
        raise ValueError(f"limit must be at least 0 bytes, got {limit}")
    global _cache_limit
    mx.set_cache_limit(limit)
    _cache_limit = limit
    return limit


_cache_limit = 0
if backend_error is None:
    _before = mx.set_cache_limit(0)
    set_cache_limit(min(_before, total_memory() // _CACHE_FRACTION))  # a lower limit set by the host program stays


def batch_size(size: int) -> int:
    """How many pieces of work of `size` bytes to compute at once.

    One on a CPU, whose caches gain nothing from more; up to eight on a GPU, within a sixth of its memory.
    """
    if mx.default_device() == mx.Device(mx.cpu):
        return 1
    return max(1, min(8, total_memory() // 6 // size))


def use_device(kind: str) -> None:
    """Makes "cpu" or "gpu" MLX's default device.

    Raises:
        ValueError: if MLX has no such device here.
    """
    if kind not in ("cpu", "gpu"):
        raise ValueError(f'device must be "cpu" or "gpu", got {kind!r}')
    device = mx.Device(getattr(mx, kind))
    if not mx.is_available(device):
        raise ValueError(f"device must be available, got {kind!r}: MLX has no {kind.upper()} here")
    mx.set_default_device(device)


@contextmanager
def device_of(kind: str | None) -> Iterator[None]:
    """A context in which the default device is `kind`, "cpu" or "gpu", or for None the current one."""
    before = mx.default_device()
    try:
        if kind is not None:
            use_device(kind)
        yield
    finally:
        mx.set_default_device(before)


def process_group() -> mx.distributed.Group | None:
    """The processes that mlx.launch, or MPI, started together; None for a process on its own."""
    if not any(name in os.environ for name in _LAUNCHED):
        return None
    hosts = os.environ.get("MLX_HOSTFILE")
    if hosts and not Path(hosts).read_text().strip():  # mlx.launch of one process
        return None
    group = mx.distributed.init()
    return group if group.size() > 1 else None


def total(count: int, group: mx.distributed.Group | None) -> int:
    """The sum of a count over the processes of a group; each waits for all."""
    if group is None:
        return count
    return cast(int, mx.distributed.all_sum(mx.array(count), group=group, stream=mx.cpu).item())


def report() -> DeviceReport:
    """Describes the device, its memory, the BLAS and the version of MLX of this process."""
    device = mx.default_device()
    kind = "gpu" if device == mx.Device(mx.gpu) else "cpu"
    name = str(mx.device_info(device).get("device_name", kind))
    return DeviceReport(kind, name, total_memory(), _cache_limit, blas, version("mlx"), workers)
