"""The command info."""

from __future__ import annotations

import argparse

from .._version import __version__
from ..backend import device


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `mlx-xformer info`."""
    parser.add_argument("model", nargs="?", metavar="MODEL", help="a model's name or checkpoint folder")


def run(options: argparse.Namespace) -> int:
    """Prints what computes here, or what a model is; returns the exit code."""
    if options.model is not None:
        from ..pretrained.summary import describe

        print(describe(options.model))
        return 0
    report = device.report()
    print(f"mlx-xformer {__version__}, MLX {report.mlx}")
    print(f"device        {report.device} ({report.name})")
    cache = f"{report.cache_limit / 2**20:.0f} MiB"
    print(f"memory        {report.memory / 2**30:.1f} GiB; MLX caches at most {cache} of freed memory")
    print(f"BLAS          {report.blas}")
    return 0
