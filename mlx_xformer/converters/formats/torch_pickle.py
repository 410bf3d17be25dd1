"""The pickles inside a PyTorch file, read without unpickling.

A pickle is a program. Here a small interpreter runs the opcodes that torch.save writes, over inert values: names stay
names, and the few calls that are understood are made by code of this package (torch_values.CALLS). Nothing that a file
holds can run. Source: the standard pickletools.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from typing import Any, BinaryIO

from ...storage.messages import shorten
from .torch_values import CALLS, STORAGES, Opaque, Ordered, Storage, Symbol

MAX_PICKLE = 16 << 20  # bytes of the pickles of a file
_MAX_NESTING = 64  # open tuples, lists and dicts at one time


def read_pickle(stream: BinaryIO, register: Callable[[Storage], None]) -> Any:
    """Reads the pickle that begins at the stream's position, which is then behind it.

    Args:
        stream: A file.
        register: Called with every storage that the pickle names; may raise ValueError.

    Returns:
        Plain Python values, Fraction, and what torch_values has.

    Raises:
        ValueError: The message names the opcode or call that is refused.
    """
    machine = _Machine(register)
    operations = pickletools.genops(stream)
    while True:
        try:
            opcode, arg, _ = next(operations)
        except Exception as error:  # pickletools raises whatever its decoders raise
            raise ValueError(f"the file holds no whole pickle: {shorten(error)}") from None
        if opcode.name == "STOP":
            return machine.pop()
        if opcode.name in _CONSTANTS:
            machine.stack.append(_CONSTANTS[opcode.name])
        elif opcode.name in _LITERALS:
            machine.stack.append(arg)
        elif opcode.name in _OPERATIONS:
            _OPERATIONS[opcode.name](machine, arg)
        else:
            raise ValueError(f"the pickle uses the opcode {opcode.name}, which weights do not need: refused")


class _Machine:
    """The stack and the memo, and what each opcode does to them."""

    def __init__(self, register: Callable[[Storage], None]):
        self.register = register
        self.stack: list[Any] = []
        self.outer: list[list[Any]] = []  # the stacks below each open mark
        self.memo: dict[int, Any] = {}

    def pop(self, _: Any = None) -> Any:
        if not self.stack:
            raise ValueError("the pickle takes a value from an empty stack")
        return self.stack.pop()

    def top(self, *kinds: type) -> Any:
        if not self.stack or not isinstance(self.stack[-1], kinds):
            raise ValueError(f"the pickle fills a {kinds[0].__name__} that is not there")
        return self.stack[-1]

    def mark(self, _: Any) -> None:
        if len(self.outer) >= _MAX_NESTING:
            raise ValueError(f"the pickle nests deeper than {_MAX_NESTING}")
        self.outer.append(self.stack)
        self.stack = []

    def to_mark(self, _: Any = None) -> list[Any]:
        if not self.outer:
            raise ValueError("the pickle closes what it never opened")
        items, self.stack = self.stack, self.outer.pop()
        return items

    def tuple_to_mark(self, _: Any) -> None:
        items = tuple(self.to_mark())
        self.stack.append(items)

    def pack(self, count: int) -> None:
        self.stack.append(tuple([self.pop() for _ in range(count)][::-1]))

    def extend(self, items: list[Any]) -> None:
        target = self.top(list, Opaque)
        if isinstance(target, list):
            target.extend(items)

    def update(self, items: list[Any]) -> None:
        target = self.top(dict, Opaque)
        if len(items) % 2:
            raise ValueError("the pickle sets a key without a value")
        if isinstance(target, Opaque):
            return
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, (str, int, float, type(None))):  # the hash of a tuple may take for ever
                key = Opaque(f"a key that is a {type(key).__name__}")
            if key in target:
                raise ValueError(f"the pickle names {shorten(key)} twice")
            target[key] = value

    def put(self, index: int | None) -> None:
        self.memo[len(self.memo) if index is None else index] = self.top(object)

    def get(self, index: int) -> None:
        if index not in self.memo:
            raise ValueError(f"the pickle asks for value {index}, which it never kept")
        self.stack.append(self.memo[index])

    def symbol(self, name: str) -> None:
        self.stack.append(Symbol(name))

    def stack_global(self, _: Any) -> None:
        name, module = self.pop(), self.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise ValueError("the pickle names a global by something that is not text")
        self.symbol(f"{module}.{name}")

    def reduce(self, _: Any) -> None:
        args, called = self.pop(), self.pop()
        if not isinstance(called, (Symbol, Opaque)) or not isinstance(args, tuple):
            name = called.name if isinstance(called, (Symbol, Opaque)) else type(called).__name__
            raise ValueError(f"the pickle calls {shorten(name)}, as weights do not need: refused, nothing was run")
        call = CALLS.get(called.name) if isinstance(called, Symbol) else None
        self.stack.append(Opaque(called.name, args) if call is None else call(*args))

    def new_object(self, opcode: str) -> None:
        if opcode == "NEWOBJ_EX":
            self.pop()  # keyword arguments
        args, made = self.pop(), self.pop()
        if not isinstance(made, (Symbol, Opaque)) or not isinstance(args, tuple) or made.name in CALLS:
            name = made.name if isinstance(made, (Symbol, Opaque)) else type(made).__name__
            raise ValueError(f"the pickle uses {opcode} on {shorten(name)}: refused, nothing was run")
        self.stack.append(Opaque(made.name, args))

    def opaque_set(self, items: list[Any], name: str) -> None:
        self.stack.append(Opaque(name, (items,)))

    def build(self, _: Any) -> None:
        state = self.pop()
        target = self.top(Ordered, Opaque)
        if isinstance(target, Opaque):
            target.state = state
        elif not isinstance(state, dict) or set(state) - {"_metadata"}:
            raise ValueError("the pickle sets attributes (BUILD) other than a state dict's _metadata: refused")

    def persistent(self, _: Any) -> None:
        match self.pop():
            case ("module", Symbol() as klass, _, _):  # the older format keeps a class with its source code
                self.stack.append(klass)
                return
            case ("storage", Symbol(name=name), str(key), str(), int(numel), *views) if name in STORAGES and views in (
                [],
                [None],
            ):
                dtype, width = STORAGES[name]
            case (_, Symbol(name=name), *_):
                raise ValueError(
                    f"the pickle has a persistent id of {shorten(name)}, no storage of a known type: refused"
                )
            case _:
                raise ValueError("the pickle has a persistent id that is not a storage: refused")
        storage = Storage(key, dtype, width, numel)
        self.register(storage)
        self.stack.append(storage)


_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_LITERALS = {
    *("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
_OPERATIONS: dict[str, Callable[[_Machine, Any], object]] = {
    "PROTO": lambda machine, arg: None,
    "FRAME": lambda machine, arg: None,
    "POP": _Machine.pop,
    "POP_MARK": _Machine.to_mark,
    "MARK": _Machine.mark,
    "EMPTY_LIST": lambda machine, arg: machine.stack.append([]),
    "EMPTY_DICT": lambda machine, arg: machine.stack.append({}),
    "EMPTY_SET": lambda machine, arg: machine.opaque_set([], "set"),
    "FROZENSET": lambda machine, arg: machine.opaque_set(machine.to_mark(), "frozenset"),
    "TUPLE": _Machine.tuple_to_mark,
    "TUPLE1": lambda machine, arg: machine.pack(1),
    "TUPLE2": lambda machine, arg: machine.pack(2),
    "TUPLE3": lambda machine, arg: machine.pack(3),
    "APPEND": lambda machine, arg: machine.extend([machine.pop()]),
    "APPENDS": lambda machine, arg: machine.extend(machine.to_mark()),
    "ADDITEMS": lambda machine, arg: machine.extend(machine.to_mark()),
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
    "NEWOBJ": lambda machine, arg: machine.new_object("NEWOBJ"),
    "NEWOBJ_EX": lambda machine, arg: machine.new_object("NEWOBJ_EX"),
    "BUILD": _Machine.build,
    "BINPERSID": _Machine.persistent,
}
