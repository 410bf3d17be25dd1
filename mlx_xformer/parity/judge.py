"""How a result is judged: its error is divided by a tolerance that is derived, not chosen. At most 1 passes.

Values, float32: 4 max|twin32 - twin64| + 1e-6 max|twin64|, where twin64 and twin32 are the NumPy twin in float64 and in
float32 at the inputs rounded to float32.
Values, float16 and bfloat16: c eps max|twin64| at the inputs rounded to the dtype; c belongs to the operation, and eps
is 2^-10 or 2^-7.
Where values are small differences of large ones (the tail of GELU), the largest input counts as well as max|twin64|.

Gradients, float32: <vjp(u), t> for random normal u and t against the central difference of twin64 along t, which is
good to 1e-8. The tolerance is the sum of 2e-5 |vjp|, which is of the order of <vjp, t>; of the same part of |vjp| as
float32 costs the values of the twin; and, since gradients cancel, of 2e-6 of the largest |vjp| of all arrays and of
1e-8 |u| |twin64|.
Gradients, float16 and bfloat16: the float32 gradient at the same inputs is checked like that, and every element is then
held to it, within c eps of the largest element of all gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from .samples import Arrays, Case, Rng, Sample

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
STEP = 1e-7  # of the central difference: its truncation and its rounding are both below 1e-8
EPS = {"float16": 2.0**-10, "bfloat16": 2.0**-7}


Twin = Callable[[Arrays], list[np.ndarray]]  # arrays by name -> outputs, in the precision of the arrays


class Verdict(NamedTuple):
    """The error divided by its tolerance, and in words what is wrong (empty if nothing is)."""

    ratio: float
    why: str = ""

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong."""
        return not self.why


def _largest(x: np.ndarray) -> float:
    return float(np.abs(x).max(initial=0))


def _largest_finite(x: np.ndarray) -> float:
    return _largest(x[np.isfinite(x)])


def _rounding(truth: np.ndarray, single: np.ndarray) -> float:
    """The largest error of the twin in float32, where both are finite."""
    finite = np.isfinite(truth) & np.isfinite(single)
    return _largest(single[finite] - truth[finite])


def value_tolerance(truth: np.ndarray, single: np.ndarray, scale: float | None = None) -> float:
    """The tolerance of values in float32.

    Args:
        truth: The twin's result in float64 (or complex128).
        single: The twin's result in float32 (or complex64).
        scale: What 1e-6 is a part of, by default the largest finite |truth|.
    """
    return 4 * _rounding(truth, single) + 1e-6 * (_largest_finite(truth) if scale is None else scale)


def compare(actual: np.ndarray, expected: np.ndarray, tolerance: float) -> Verdict:
    """Compares two arrays: shapes, integers, booleans, NaN and infinities must be equal, other values within the
    tolerance."""
    if actual.shape != expected.shape:
        return Verdict(np.inf, f"shape {actual.shape}, expected {expected.shape}")
    if expected.dtype.kind in "bui":
        wrong = int(np.sum(actual != expected))
        if actual.dtype.kind not in "bui" or (actual.dtype.kind == "b") != (expected.dtype.kind == "b"):
            return Verdict(np.inf, f"dtype {actual.dtype}, expected {expected.dtype}")
        return Verdict(np.inf, f"{wrong} of {expected.size} values differ") if wrong else Verdict(0.0)
    finite = np.isfinite(expected)
    odd = np.where(finite, 0, expected)
    same = np.array_equal(np.where(np.isfinite(actual), 0, actual), odd, equal_nan=True)
    if not same:
        count, wanted = (int(np.sum(~np.isfinite(x))) for x in (actual, expected))
        return Verdict(np.inf, f"{count} values are NaN or infinite, expected {wanted}, or in other places")
    error = _largest(actual[finite] - expected[finite])
    if error == 0:
        return Verdict(0.0)
    ratio = error / tolerance if tolerance else np.inf
    return Verdict(ratio, _excess(error, ratio))


def compare_gradients(
    gradients: Arrays,
    twin: Twin,
    given: Arrays,
    cotangents: Sequence[np.ndarray],
    rng: Rng,
    directions: Iterable[Sequence[str]],
    *,
    step: float = STEP,
    rounding: float = 0.0,
    floor: float = 0.0,
) -> Verdict:
    """Compares float32 gradients with central differences of the twin along random directions.

    Args:
        gradients: The vector-Jacobian product by each array.
        twin: The twin; called in float64.
        given: The arrays by name, in float64.
        cotangents: What the outputs are multiplied by, one array for each.
        rng: What directions are drawn from.
        directions: For each direction the names of the arrays that change along it.
        step: Of the difference quotient, for normal directions.
        rounding: The part of |vjp| that float32 costs the twin's values.
        floor: An absolute addition to the tolerance.

    Returns:
        The worst verdict.
    """
    norms = {name: float(np.linalg.norm(g)) for name, g in gradients.items()}
    verdicts = []
    for names in directions:
        t = {name: rng.normal(size=given[name].shape) for name in names}
        expected = _quotient(twin, given, t, cotangents, step)
        allowed = (2e-5 + rounding) * math.hypot(*(norms[name] for name in names))
        allowed += 2e-6 * max(norms.values()) + floor
        difference = float(abs(sum((gradients[name] * x).sum() for name, x in t.items()) - expected))
        ratio = difference / allowed if difference else 0.0
        where = ", ".join(name.lstrip("/") for name in names) if len(names) < 5 else "all arrays"
        excess = _excess(difference, ratio)
        verdicts.append(Verdict(ratio, excess and f"gradient by {where}: {excess}"))
    return worst(verdicts)


def _quotient(twin: Twin, given: Arrays, t: Arrays, cotangents: Sequence[np.ndarray], step: float) -> float:
    """The central difference of <cotangents, twin> along t."""
    sides = [twin({**given, **{name: given[name] + by * x for name, x in t.items()}}) for by in (step, -step)]
    return sum(float(((a - b) * u).sum()) for a, b, u in zip(*sides, cotangents, strict=True)) / (2 * step)


def rounded(arrays: Arrays, dtype: str) -> Arrays:
    """The arrays as the dtype holds them, in float64."""
    return {name: _double(mx.array(x.astype(np.float32)).astype(DTYPES[dtype])) for name, x in arrays.items()}


def _double(x: mx.array) -> np.ndarray:
    """Floats as float64; bool and int as they are."""
    return np.array(x.astype(mx.float32), np.float64) if mx.issubdtype(x.dtype, mx.floating) else np.array(x)


def _several(x: Any) -> list:
    return list(x) if isinstance(x, (tuple, list)) else [x]


def _device(x: np.ndarray, dtype: str, strided: bool) -> mx.array:
    """An MLX array of a dtype; strided: a view into one with other axes last and NaN between its values."""
    single = x.astype(np.float32)
    if not strided or x.ndim == 0:
        return mx.array(single).astype(DTYPES[dtype])
    gaps = np.full((*x.shape, 2), np.nan, np.float32)
    gaps[..., 0] = single
    gaps = gaps.reshape(*x.shape[:-1], -1)
    if x.ndim == 1:
        return mx.array(gaps).astype(DTYPES[dtype])[::2]
    return mx.array(np.ascontiguousarray(gaps.swapaxes(-1, -2))).astype(DTYPES[dtype]).swapaxes(-1, -2)[..., ::2]


class Trial:
    """A sample of a case in a dtype, computed by both sides."""

    def __init__(self, case: Case, sample: Sample, dtype: str):
        self.case, self.sample, self.dtype = case, sample, dtype
        self.names = [*sample.params, *(f"/{name}" for name in sample.arrays)]
        floats = {**sample.params, **{f"/{name}": x for name, x in sample.arrays.items()}}
        self.given = rounded(floats, dtype)
        self.options = {
            name: mx.array(value) if isinstance(value, np.ndarray) else value for name, value in sample.options.items()
        }

    def ours(self, *values: mx.array) -> Any:
        """The operation at arrays in the order of `names`."""
        return self._call(self.case.ours, dict(zip(self.names, values, strict=True)), self.options)

    def twin(self, given: Arrays) -> list[np.ndarray]:
        """The twin at arrays by name."""
        with np.errstate(all="ignore"):
            return [np.asarray(x) for x in _several(self._call(self.case.twin, given, self.sample.options))]

    @cached_property
    def truth(self) -> list[np.ndarray]:
        """The twin's results in float64."""
        return self.twin(self.given)

    @cached_property
    def single(self) -> list[np.ndarray]:
        """The twin's results in float32."""
        results = self.twin({name: x.astype(np.float32) for name, x in self.given.items()})
        return [x.astype(np.float32) if x.dtype == np.float64 else x for x in results]

    def _call(self, form: Callable, given: dict, options: Any) -> Any:
        params = {name: x for name, x in given.items() if not name.startswith("/")}
        arrays = {name[1:]: x for name, x in given.items() if name.startswith("/")}
        return form(params, arrays, options)

    def primals(self, dtype: str) -> list[mx.array]:
        """The arrays in MLX, in a dtype, in the order of `names`."""
        return [_device(self.given[name], dtype, self.sample.strided and name[0] == "/") for name in self.names]

    def values(self) -> Verdict:
        """Compares the operation's values with the twin's."""
        outputs = _several(self.ours(*self.primals(self.dtype)))
        if len(outputs) != len(self.truth):
            return Verdict(np.inf, f"{len(outputs)} outputs, expected {len(self.truth)}")
        wanted = self.case.result or self.dtype
        verdicts = []
        for index, (out, truth) in enumerate(zip(outputs, self.truth, strict=True)):
            if truth.dtype.kind == "f" and out.dtype != DTYPES[wanted]:
                return Verdict(np.inf, f"dtype {out.dtype}, expected {wanted}")
            verdicts.append(compare(_double(out), truth, self._tolerance(index)))
        return worst(verdicts)

    def _tolerance(self, index: int) -> float:
        truth = self.truth[index]
        if truth.dtype.kind != "f":
            return 0.0
        scale = max(_largest_finite(truth), self._input)
        if self.dtype == "float32":
            return value_tolerance(truth, self.single[index], scale)
        return self.case.half * EPS[self.dtype] * scale

    @property
    def _input(self) -> float:
        """The largest input, where the case measures by it."""
        return max(map(_largest_finite, self.given.values()), default=0.0) if self.case.by_input else 0.0

    def vjp(self, rng: Rng) -> Verdict:
        """Compares the operation's vector-Jacobian product by every array with differences of the twin."""
        cotangents = [rng.normal(size=x.shape) for x in self.truth]
        floor = 1e-8 * math.hypot(*map(np.linalg.norm, cotangents)) * math.hypot(*map(np.linalg.norm, self.truth))
        gradients = self._gradients(self.dtype, cotangents)
        for name, g in gradients.items():
            if not np.isfinite(g).all():
                return Verdict(np.inf, f"the gradient by {name.lstrip('/')} is not finite")
        if self.dtype == "float32":
            return self._vjp32(gradients, cotangents, rng, floor)
        single = self._gradients("float32", cotangents)
        proven = self._vjp32(single, cotangents, rng, floor)
        if not proven.passed:
            return Verdict(proven.ratio, f"in float32 at these inputs, {proven.why}")
        return self._vjp16(gradients, single, max(map(_largest, cotangents)), floor)

    def _gradients(self, dtype: str, cotangents: Sequence[np.ndarray]) -> Arrays:
        wanted = DTYPES[self.case.result or dtype]
        # Both precisions get the cotangents that half precision holds.
        u = [mx.array(c.astype(np.float32)).astype(DTYPES[self.dtype]).astype(wanted) for c in cotangents]
        for i, c in enumerate(u):
            cotangents[i][...] = _double(c)
        _, gradients = mx.vjp(lambda *x: _several(self.ours(*x)), self.primals(dtype), u)
        return {name: _double(g) for name, g in zip(self.names, gradients, strict=True)}

    def _vjp16(self, gradients: Arrays, truth: Arrays, u: float, floor: float) -> Verdict:
        scale = max([*map(_largest, truth.values()), u if self.case.by_input else 0.0])
        allowed = self.case.half_vjp * EPS[self.dtype] * scale + floor
        verdicts = []
        for name, g in gradients.items():
            verdict = compare(g, truth[name], allowed)
            verdicts.append(Verdict(verdict.ratio, verdict.why and f"gradient by {name.lstrip('/')}: {verdict.why}"))
        return worst(verdicts)

    def _vjp32(self, gradients: Arrays, cotangents: list[np.ndarray], rng: Rng, floor: float) -> Verdict:
        """Along a random direction for each array, or (joint) along all of them at once."""
        pairs = zip(self.truth, self.single, strict=True)
        rounding = max(4 * _rounding(a, b) / (_largest_finite(a) or 1.0) for a, b in pairs)
        directions = [self.names] if self.sample.joint else [[name] for name in self.names]
        options = {"rounding": rounding, "floor": floor}
        return compare_gradients(gradients, self.twin, self.given, cotangents, rng, directions, **options)


def _excess(error: float, ratio: float) -> str:
    """What is wrong, in words, if the error is larger than its tolerance."""
    if ratio <= 1:
        return ""
    return f"error {error:.3g} " + (
        "where none is tolerated" if ratio == math.inf else f"is {ratio:.3g} times its tolerance"
    )


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    """The verdict of the largest error; one that fails goes before those that pass."""
    return max(verdicts, key=lambda verdict: (not verdict.passed, verdict.ratio), default=Verdict(0.0))
