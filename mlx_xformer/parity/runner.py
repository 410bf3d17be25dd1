"""run(): draws the samples, computes both sides, counts."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from .._version import __version__
from ..backend import device as runtime
from . import cases, families
from .judge import DTYPES, Trial, Verdict
from .report import Place, Report, Row
from .samples import Case, Rng, Sample

CASES: dict[str, Case] = {**cases.CASES, **families.CASES}
NAMES = tuple(CASES)
_FAILURES = (ValueError, TypeError, RuntimeError, ArithmeticError, IndexError, KeyError, AttributeError)
Progress = Callable[[str, int, int], None]


def run(
    names: Iterable[str] = (),
    *,
    dtypes: Sequence[str] | None = None,
    seeds: int | Sequence[int] = 2,
    device: str | None = None,
    folder: str | Path | None = None,
    progress: Progress | None = None,
) -> Report:
    """Compares operations and layers with their NumPy twins, or those of a checkpoint with its own weights.

    Args:
        names: Names among NAMES, all by default.
        dtypes: Names among DTYPES, all by default; "float32" alone for a checkpoint.
        seeds: How many seeds samples are drawn from, counted from 0, or which.
        device: "cpu" or "gpu", for this call; by default MLX's default device.
        folder: A checkpoint, whose layers are proven instead.
        progress: Called with the name that comes next, how many are done, and how many there are.

    Returns:
        A report with a row for each operation and check.

    Raises:
        ValueError: For an unknown name, dtype or device, no seed, names that are proven in float32 alone without that
            dtype, or a folder whose family has no twin.
    """
    chosen = tuple(range(seeds)) if isinstance(seeds, int) else tuple(seeds)
    if not chosen or min(chosen) < 0:
        shown = seeds if isinstance(seeds, int) else ", ".join(map(str, seeds))
        raise ValueError(f"seeds must be at least one number from 0, got {shown}")
    dtypes = (tuple(DTYPES) if folder is None else ("float32",)) if dtypes is None else tuple(dict.fromkeys(dtypes))
    if not dtypes:
        raise ValueError(f"dtypes must be at least one of {', '.join(DTYPES)}, got {dtypes}")
    _check_known("dtypes", dtypes, tuple(DTYPES))
    names = list(dict.fromkeys(names))
    _check_known("names", names, NAMES)
    if folder is not None and names:
        raise ValueError(f"names must be empty where a folder is proven, got {', '.join(names)}")
    if folder is not None and dtypes != ("float32",):
        raise ValueError(f"dtypes must be float32 where a folder is proven, got {', '.join(dtypes)}")
    began = time.monotonic()
    with runtime.device_of(device):
        chosen_cases = _chosen(names, dtypes) if folder is None else families.model_cases(folder)
        rows: list[Row] = []
        for done, (name, case) in enumerate(chosen_cases.items()):
            if progress is not None:
                progress(name, done, len(chosen_cases))
            rows += _prove(name, case, dtypes, chosen)
        facts = runtime.report()
    versions = {"mlx-xformer": __version__, "mlx": facts.mlx, "numpy": np.__version__}
    return Report(tuple(rows), f"{facts.device} ({facts.name})", versions, chosen, time.monotonic() - began)


def _chosen(names: Sequence[str], dtypes: Sequence[str]) -> dict[str, Case]:
    """The cases of these names, or of all, that are checked in one of the dtypes."""
    chosen = {name: CASES[name] for name in names or NAMES}
    kept = {name: case for name, case in chosen.items() if not case.float32_only or "float32" in dtypes}
    lost = [name for name in names if name not in kept]
    if lost:
        raise ValueError(f"dtypes must hold float32 for {', '.join(lost)}, got {', '.join(dtypes)}")
    return kept


def _check_known(what: str, given: Sequence[str], known: tuple[str, ...]) -> None:
    for name in given:
        if name not in known:
            raise ValueError(f"{what} must be among {', '.join(known)}, got {name!r}")


def generator(name: str, seed: int) -> Rng:
    """What the samples of a case are drawn from."""
    return np.random.default_rng([seed, zlib.crc32(name.encode())])


def _prove(name: str, case: Case, dtypes: Sequence[str], seeds: Sequence[int]) -> list[Row]:
    """The rows of a case: its values in each dtype, then its vector-Jacobian products."""
    if case.constant or case.float32_only:
        dtypes = ("float32",)
    values = {dtype: Row(name, "exact" if case.constant else dtype) for dtype in dtypes}
    products = {} if case.constant or not case.vjp else {dtype: Row(name, f"{dtype} vjp") for dtype in dtypes}
    for seed in seeds:
        for index, sample in enumerate(case.samples(generator(name, seed))):
            for dtype in dtypes:
                place = Place(seed, index, sample.what)
                _check(case, sample, dtype, place, values[dtype], products.get(dtype))
    return [*values.values(), *products.values()]


def _check(case: Case, sample: Sample, dtype: str, place: Place, values: Row, products: Row | None) -> None:
    """One sample in one dtype. An exception is a failure: every sample is one that the operation takes."""
    if sample.case is not None:
        case, products = sample.case, products if sample.case.vjp else None
    half = sample.skip_half if dtype != "float32" else ""
    trial = Trial(case, sample, dtype)
    draw = np.random.default_rng([place.seed, place.sample])
    for row, reason, ask in (
        (values, half, trial.values),
        (products, half or sample.skip_vjp, lambda: trial.vjp(draw)),
    ):
        if row is None:
            continue
        if reason:
            row.skip(reason)
            continue
        try:
            verdict = ask()
        except _FAILURES as error:
            verdict = Verdict(np.inf, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
        row.add(verdict.ratio, replace(place, why=verdict.why))
