"""mlx-xformer parity."""

from __future__ import annotations

import argparse
import os
from pathlib import Path


def add(parser: argparse.ArgumentParser) -> None:
    """Its arguments."""
    add = parser.add_argument
    add("what", nargs="*", metavar="NAME|MODEL", help="operations and layers, or a model's folder; everything if none")
    add("--dtype", action="append", choices=["float32", "float16", "bfloat16"], help="only this dtype; may be repeated")
    add("--seeds", type=int, default=2, metavar="N", help="how many draws of the samples")
    add("--device", choices=["cpu", "gpu"], help="what computes; by default the GPU where there is one")
    add("--json", action="store_true", help="print everything as JSON instead of a table")
    add("--list", action="store_true", help="list the names, and exit")


def run(options: argparse.Namespace) -> int:
    """Prints the table; 0 if everything was proven."""
    from tqdm import tqdm

    from .. import parity

    if options.list:
        print("\n".join(parity.NAMES))
        return 0
    os.environ.setdefault("MLX_ENABLE_TF32", "0")  # MLX reads it at its first product, and rounds to 10 bits by default
    folder = _model(options.what, parity.NAMES)
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


def _model(given: list[str], names: tuple[str, ...]) -> Path | None:
    """The folder of a converted model, where that is what was given: a name of ours goes before a folder's."""
    from ..pretrained.loading import NAMES, resolve

    models = [x for x in given if x not in names and (x in NAMES or Path(x).exists() or os.sep in x)]
    if not models:
        return None
    if len(given) > 1:
        raise ValueError(f"a model must be given alone, got {' '.join(given)}")
    known = models[0] in NAMES or Path(models[0]).exists()
    return resolve(models[0]) if known else Path(models[0])  # which is not there
