"""The command convert."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `mlx-xformer convert`."""
    argument = parser.add_argument
    argument(
        "source",
        type=Path,
        metavar="SOURCE",
        help="a checkpoint file, a GGUF file, a folder, or the .yaml of a bag of models (averaged outputs)",
    )
    argument("out", type=Path, metavar="OUT", help="the folder to write")
    argument(
        "--to",
        choices=["mlx", "pytorch"],
        default="mlx",
        help="the layout to write; pytorch: the original one, of demucs also as .th",
    )
    argument("--family", metavar="F", help="refuse a source of another family")
    quantize = "bits of a language model's quantized matrices (routers stay floats); 0 converts them to floats"
    argument("--quantize", type=int, choices=[0, 4, 8], help=quantize)
    argument(
        "--group-size", type=int, choices=[32, 64, 128], default=64, help="how many quantized numbers share a scale"
    )
    argument(
        "--dtype",
        choices=["float32", "float16", "bfloat16"],
        help="dtype of a language model's floats; by default as in the source",
    )
    argument(
        "--set",
        action="append",
        metavar="NAME=VALUE",
        help="a setting that the source does not have, such as num_heads=8 or sources=vocals,other; may be repeated",
    )
    argument("--dry-run", action="store_true", help="print what would be written, and write nothing")


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
        given["settings"] = dict(map(_parse_setting, options.set or []))
        report = convert(options.source, options.out, **given, progress=progress)
    print(report)
    return 0


def _parse_setting(text: str) -> tuple[str, Any]:
    """Parses NAME=VALUE; a value that is not JSON is a string."""
    name, separator, value = text.partition("=")
    if not name or not separator:
        raise ValueError(f"--set must be NAME=VALUE, got {text!r:.80}")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value
