"""The command convert."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `mlx-xformer convert`."""
    argument = parser.add_argument
    argument("source", type=Path, metavar="SOURCE", help="a checkpoint file, bag (.yaml), GGUF file or folder")
    argument("out", type=Path, metavar="OUT", help="the folder to write")
    argument("--to", choices=["mlx", "pytorch"], default="mlx", help="the layout to write")
    argument("--family", metavar="F", help="refuse a source of another family")
    quantize = "bits of a language model's matrices, not of routers; 0: floats"
    argument("--quantize", type=int, choices=[0, 4, 8], help=quantize)
    argument("--group-size", type=int, choices=[32, 64, 128], default=64, help="numbers that share a scale")
    argument(
        "--dtype", choices=["float32", "float16", "bfloat16"], help="of a language model's floats, if not as they are"
    )
    argument("--set", action="append", metavar="NAME=VALUE", help="what a file does not tell, as num_heads=8")
    argument("--dry-run", action="store_true", help="report what would be written, write nothing")


def run(options: argparse.Namespace) -> int:
    """Converts; returns the exit code."""
    from tqdm import tqdm

    from ..converters.conversion import convert

    names = ("family", "to", "dry_run", "quantize", "group_size", "dtype")
    with tqdm(desc=options.source.name, unit="tensor", leave=False, disable=None) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        given = {name: getattr(options, name) for name in names}
        given["settings"] = dict(map(_setting, options.set or []))
        report = convert(options.source, options.out, **given, progress=progress)
    print(report)
    return 0


def _setting(text: str) -> tuple[str, Any]:
    """NAME=VALUE; a value that is not JSON is text."""
    name, separator, value = text.partition("=")
    if not name or not separator:
        raise ValueError(f"--set must be NAME=VALUE, got {text!r:.80}")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value
