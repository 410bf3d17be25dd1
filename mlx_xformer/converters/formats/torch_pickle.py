"""The pickle inside a PyTorch file, read without unpickling.

A pickle is a program. Here a small interpreter runs the few opcodes that weights need, over inert values: names stay
names, the four calls that occur are made by code of this file, and everything else is refused by name, so nothing
that a file holds can run. Sources: the standard pickletools; torch/_utils.py for the four calls.
"""

from __future__ import annotations

import io
import math
import pickletools
import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from ...storage.messages import shorten

_MAX_NESTING = 64  # open tuples, lists and dicts at one time
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
CLASSES = {"demucs.htdemucs.HTDemucs", "demucs.hdemucs.HDemucs", "demucs.demucs.Demucs"}  # names, never called


@dataclass(frozen=True)
class Symbol:
    """A global of the pickle: its dotted name and nothing else."""

    name: str


@dataclass(frozen=True)
class Storage:
    """`numel` elements under `key` in the archive."""

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


class _Ordered(dict):
    """What collections.OrderedDict() gives: the one kind of value that may be given attributes, and loses them."""


def read_pickle(pickle: bytes, storages: dict[str, int]) -> Any:
    """The value of a pickle: plain Python values, Fraction, Symbol and View.

    `storages` holds the bytes there are under each key. ValueError names the opcode, global or call that is refused.
    """
    machine = _Machine(storages)
    operations = pickletools.genops(io.BytesIO(pickle))
    while True:
        try:
            opcode, arg, _ = next(operations)
        except Exception as error:  # pickletools raises whatever its decoders raise
            raise ValueError(f"data.pkl is no whole pickle: {shorten(error)}") from None
        if opcode.name == "STOP":
            return machine.pop()
        if opcode.name in _CONSTANTS:
            machine.stack.append(_CONSTANTS[opcode.name])
        elif opcode.name in _LITERALS:
            machine.stack.append(arg)
        elif opcode.name in _OPERATIONS:
            _OPERATIONS[opcode.name](machine, arg)
        else:
            raise ValueError(f"data.pkl uses the opcode {opcode.name}, which weights do not need: refused")


class _Machine:
    """The stack and the memo, and what each opcode does to them."""

    def __init__(self, storages: dict[str, int]):
        self.storages = storages
        self.stack: list[Any] = []
        self.outer: list[list[Any]] = []  # the stacks below each open mark
        self.memo: dict[int, Any] = {}

    def pop(self, _: Any = None) -> Any:
        if not self.stack:
            raise ValueError("data.pkl takes a value from an empty stack")
        return self.stack.pop()

    def top(self, kind: type) -> Any:
        if not self.stack or not isinstance(self.stack[-1], kind):
            raise ValueError(f"data.pkl fills a {kind.__name__.strip('_')} that is not there")
        return self.stack[-1]

    def mark(self, _: Any) -> None:
        if len(self.outer) >= _MAX_NESTING:
            raise ValueError(f"data.pkl nests deeper than {_MAX_NESTING}")
        self.outer.append(self.stack)
        self.stack = []

    def to_mark(self) -> list[Any]:
        if not self.outer:
            raise ValueError("data.pkl closes what it never opened")
        items, self.stack = self.stack, self.outer.pop()
        return items

    def tuple_to_mark(self, _: Any) -> None:
        items = tuple(self.to_mark())
        self.stack.append(items)

    def pack(self, count: int) -> None:
        self.stack.append(tuple([self.pop() for _ in range(count)][::-1]))

    def extend(self, items: list[Any]) -> None:
        self.top(list).extend(items)

    def update(self, items: list[Any]) -> None:
        target = self.top(dict)
        if len(items) % 2:
            raise ValueError("data.pkl sets a key without a value")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, (str, int, float, type(None))):  # the hash of a tuple may take for ever
                raise ValueError(f"data.pkl has a key that is a {type(key).__name__}, not text or a number")
            if key in target:
                raise ValueError(f"data.pkl names {shorten(key)} twice")
            target[key] = value

    def put(self, index: int | None) -> None:
        self.memo[len(self.memo) if index is None else index] = self.top(object)

    def get(self, index: int) -> None:
        if index not in self.memo:
            raise ValueError(f"data.pkl asks for value {index}, which it never kept")
        self.stack.append(self.memo[index])

    def symbol(self, name: str) -> None:
        if name not in _CALLS and name not in STORAGES and name not in CLASSES:
            raise ValueError(f"data.pkl names {shorten(name)}, which weights do not need: refused, nothing was run")
        self.stack.append(Symbol(name))

    def stack_global(self, _: Any) -> None:
        name, module = self.pop(), self.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise ValueError("data.pkl names a global by something that is not text")
        self.symbol(f"{module}.{name}")

    def reduce(self, _: Any) -> None:
        args, called = self.pop(), self.pop()
        name = called.name if isinstance(called, Symbol) else type(called).__name__
        if not isinstance(called, Symbol) or name not in _CALLS or not isinstance(args, tuple):
            raise ValueError(f"data.pkl calls {shorten(name)}, which weights do not need: refused, nothing was run")
        self.stack.append(_CALLS[name](*args))

    def build(self, _: Any) -> None:
        attributes = self.pop()
        self.top(_Ordered)
        if not isinstance(attributes, dict) or set(attributes) - {"_metadata"}:
            raise ValueError("data.pkl sets attributes (BUILD) other than a state dict's _metadata: refused")

    def persistent(self, _: Any) -> None:
        match self.pop():
            case ("storage", Symbol(name=name), str(key), str(), int(numel)) if name in STORAGES:
                dtype, width = STORAGES[name]
            case _:
                raise ValueError("data.pkl has a persistent id that is not a storage of a known type: refused")
        if key not in self.storages:
            raise ValueError(f"data.pkl names storage {shorten(key)}, which the zip does not hold")
        if self.storages[key] != numel * width:
            raise ValueError(f"storage {key} must be {numel} x {width} bytes, got {self.storages[key]}")
        self.stack.append(Storage(key, dtype, width, numel))


def _ordered(*args: Any) -> _Ordered:
    if args:
        raise ValueError("data.pkl calls OrderedDict with arguments: refused")
    return _Ordered()


def _fraction(*args: Any) -> Fraction:
    match args:  # Fraction itself would take "1e999999999" and work for ever
        case (str(text),) if re.fullmatch(r"-?\d{1,18}(/\d{1,18})?", text, re.ASCII):
            top, _, bottom = text.partition("/")
            numerator, denominator = int(top), int(bottom or 1)
        case (int(numerator), int(denominator)):
            pass
        case _:
            raise ValueError("data.pkl has a fraction that is not made of two whole numbers")
    if not denominator:
        raise ValueError("data.pkl has a fraction over 0")
    return Fraction(numerator, denominator)


def _tensor(*args: Any) -> View:
    """_rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks)."""
    match args:
        case (Storage() as storage, offset, tuple(shape), tuple(strides), bool(), dict(), *_):
            pass
        case _:
            raise ValueError("data.pkl makes a tensor from something that is not a storage: refused")
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
    if len(args) != 3 or not isinstance(args[0], View):
        raise ValueError("data.pkl makes a parameter from something that is not a tensor: refused")
    return args[0]


_CALLS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _ordered,
    "fractions.Fraction": _fraction,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_LITERALS = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE"}
_OPERATIONS: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": lambda machine, arg: None,
    "FRAME": lambda machine, arg: None,
    "MARK": _Machine.mark,
    "EMPTY_LIST": lambda machine, arg: machine.stack.append([]),
    "EMPTY_DICT": lambda machine, arg: machine.stack.append({}),
    "TUPLE": _Machine.tuple_to_mark,
    "TUPLE1": lambda machine, arg: machine.pack(1),
    "TUPLE2": lambda machine, arg: machine.pack(2),
    "TUPLE3": lambda machine, arg: machine.pack(3),
    "APPEND": lambda machine, arg: machine.extend([machine.pop()]),
    "APPENDS": lambda machine, arg: machine.extend(machine.to_mark()),
    "SETITEM": lambda machine, arg: machine.update([machine.pop(), machine.pop()][::-1]),
    "SETITEMS": lambda machine, arg: machine.update(machine.to_mark()),
    "BINPUT": _Machine.put,
    "LONG_BINPUT": _Machine.put,
    "MEMOIZE": _Machine.put,
    "BINGET": _Machine.get,
    "LONG_BINGET": _Machine.get,
    "GLOBAL": lambda machine, arg: machine.symbol(arg.replace(" ", ".")),
    "STACK_GLOBAL": _Machine.stack_global,
    "REDUCE": _Machine.reduce,
    "BUILD": _Machine.build,
    "BINPERSID": _Machine.persistent,
}
