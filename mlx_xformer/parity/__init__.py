"""The proof that a user can run: every public operation, layer and family against its NumPy twin, on the device in use.

Samples come from a seeded generator and from a grid of adverse ones: fully masked rows, single and no positions, NaN
and infinity, scores of 1e4, views with gaps, ties, sizes that take every fast path. Families are proven on small
models. judge.py derives the tolerances.
"""

from .judge import DTYPES
from .report import Report, Row
from .runner import NAMES, run

__all__ = ["DTYPES", "NAMES", "Report", "Row", "run"]
