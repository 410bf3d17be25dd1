"""The command parity."""

from __future__ import annotations

import argparse
import os
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    add = parser.add_argument
    add(
        "what",
        nargs="*",
        metavar="NAME|MODEL",
        help="operations and layers, or a model's folder; by default all operations and layers",
    )
    add("--dtype", action="append", choices=["float32", "float16", "bfloat16"], help="only this dtype; may be repeated")
    add("--seeds", type=int, default=2, metavar="N", help="how many random samples to draw for each case")
    add("--device", choices=["cpu", "gpu"], help="the device to compute on; by default the GPU if there is one")
    add("--json", action="store_true", help="print everything as JSON instead of a table")
    add("--list", action="store_true", help="list the names, and exit")


def run(options: argparse.Namespace) -> int:
    """Prints the table; returns 1 if anything failed."""
    from tqdm import tqdm

    from .. import parity

    if options.list:
        print("\n".join(parity.NAMES))
        return 0
    os.environ.setdefault("MLX_ENABLE_TF32", "0")  # read at the first product; TF32 rounds products to 10 bits
    folder = _find_model(options.what, parity.NAMES)
    with tqdm(unit="case", leave=False, disable=None) as bar:

        def progress(name: str, done: int, total: int) -> None:
            bar.total = total
            bar.set_description(name, refresh=False)
            bar.update(done - bar.n)

        report = parity.run(
            () if folder else options.what,
            dtypes=options.dtype,
            seeds=options.seeds,
            device=options.device,
            folder=folder,
            progress=progress,
        )
    print(report.to_json() if options.json else report.table())
    return int(report.failed)


def _find_model(given: list[str], names: tuple[str, ...]) -> Path | None:
    """The folder of the model that was named, if any. An operation or layer precedes a folder of the same name."""
    from ..pretrained.loading import NAMES, resolve

    models = [x for x in given if x not in names and (x in NAMES or Path(x).exists() or os.sep in x)]
    if not models:
        return None
    if len(given) > 1:
        raise ValueError(f"a model must be given alone, got {' '.join(given)}")
    known = models[0] in NAMES or Path(models[0]).exists()
    return resolve(models[0]) if known else Path(models[0])  # reading it fails
