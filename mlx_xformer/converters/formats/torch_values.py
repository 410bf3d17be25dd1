"""The values of a PyTorch file's pickle, all of them inert, and the few calls that are understood.

A name stays a name (Symbol), and what any other call would have made is an Opaque: places that do not matter, such as
the arguments of a training run, may hold whatever they like, and nothing of it runs.
Sources: torch/_utils.py (tensors and parameters); numpy's dtype.__reduce__ and scalars.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

STORAGES = {  # name -> (dtype in the words of safetensors, bytes)
    "torch.DoubleStorage": ("F64", 8),
    "torch.FloatStorage": ("F32", 4),
    "torch.HalfStorage": ("F16", 2),
    "torch.BFloat16Storage": ("BF16", 2),
    "torch.LongStorage": ("I64", 8),
    "torch.IntStorage": ("I32", 4),
    "torch.ShortStorage": ("I16", 2),
    "torch.CharStorage": ("I8", 1),
    "torch.ByteStorage": ("U8", 1),
    "torch.BoolStorage": ("BOOL", 1),
}
_SCALARS = {"b1": 1, "i1": 1, "i2": 2, "i4": 4, "i8": 8, "u1": 1, "u2": 2, "u4": 4, "u8": 8, "f2": 2, "f4": 4, "f8": 8}


@dataclass(frozen=True)
class Symbol:
    """A global of the pickle: its dotted name and nothing else."""

    name: str


@dataclass(eq=False, repr=False)
class Opaque:
    """What a call would have made, or an object of a class that is not known here. Nothing was called.

    Attributes:
        name: Of the function or class.
        args: Its arguments.
        state: What the pickle would have given to the object afterwards.
    """

    name: str
    args: tuple = ()
    state: Any = None


@dataclass(frozen=True)
class Storage:
    """`numel` elements under `key` in the file."""

    key: str
    dtype: str
    width: int
    numel: int


@dataclass(frozen=True)
class View:
    """A tensor: a strided look (in elements) into a storage, every index inside it."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Ordered(dict):
    """What collections.OrderedDict() gives. It may be given a state dict's attributes, and loses them."""


def describe_value(value: Any) -> str:
    """What a value is, for messages."""
    if isinstance(value, (Symbol, Opaque)):
        return f"{value.name}, which weights do not need (nothing was run)"
    return f"a {type(value).__name__}"


def _ordered(*args: Any) -> Ordered:
    if args:
        raise ValueError("the pickle calls OrderedDict with arguments: refused")
    return Ordered()


def _fraction(*args: Any) -> Fraction:
    match args:  # Fraction itself would take "1e999999999" and work for ever
        case (str(text),) if re.fullmatch(r"-?\d{1,18}(/\d{1,18})?", text, re.ASCII):
            top, _, bottom = text.partition("/")
            numerator, denominator = int(top), int(bottom or 1)
        case (int(numerator), int(denominator)):
            pass
        case _:
            raise ValueError("the pickle has a fraction that is not made of two whole numbers")
    if not denominator:
        raise ValueError("the pickle has a fraction over 0")
    return Fraction(numerator, denominator)


def _tensor(*args: Any) -> View:
    """_rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks)."""
    match args:
        case (Storage() as storage, offset, tuple(shape), tuple(strides), bool(), dict(), *_):
            pass
        case _:
            raise ValueError("the pickle makes a tensor from something that is not a storage: refused")
    if any(type(n) is not int or not 0 <= n < 2**48 for n in (offset, *shape, *strides)):
        raise ValueError("tensor must have an offset, sizes and strides that are whole numbers of at least 0")
    if len(shape) != len(strides) or len(shape) > 8:
        raise ValueError(f"tensor must have a stride for each of at most 8 sizes, got {len(shape)} and {len(strides)}")
    if math.prod(shape) > storage.numel:
        raise ValueError(f"tensor of size {shape} must fit its storage of {storage.numel} elements")
    last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    if math.prod(shape) and last >= storage.numel:
        raise ValueError(f"tensor of size {shape} reaches element {last} of the {storage.numel} in its storage")
    return View(storage, offset, shape, strides)


def _parameter(*args: Any) -> View:
    """_rebuild_parameter(tensor, requires_grad, hooks), and with the state of a parameter that has attributes."""
    if len(args) not in (3, 4) or not isinstance(args[0], View):
        raise ValueError("the pickle makes a parameter from something that is not a tensor: refused")
    return args[0]


def _encode_text(*args: Any) -> bytes | Opaque:
    """The bytes in a pickle of protocol 2, which has text only."""
    match args:
        case (str(text), "latin1") if text.isascii() or max(text) <= "\xff":
            return text.encode("latin1")
    return Opaque("_codecs.encode", args)


def _numpy_scalar(*args: Any) -> bool | int | float | Opaque:
    """scalar(dtype, bytes) of numpy's numbers in little-endian order, as the number of Python."""
    match args:
        case (Opaque(name="numpy.dtype", args=(str(code), *_), state=(_, "<" | "|", *_)), bytes(data)) if _SCALARS.get(
            code
        ) == len(data):
            return np.frombuffer(data, f"<{code}")[0].item()
    return Opaque("numpy.core.multiarray.scalar", args)


CALLS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _ordered,
    "fractions.Fraction": _fraction,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "_codecs.encode": _encode_text,
    "numpy.core.multiarray.scalar": _numpy_scalar,
    "numpy._core.multiarray.scalar": _numpy_scalar,
}
