"""A reader of pickles that executes nothing: names stay names, and calls are answered by `answer`.

The opcodes are carried out on plain lists and dicts.
"""

from __future__ import annotations

import pickletools
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Any

from weightops.checkpoints.formats.pickle_calls import HARMLESS, answer, hashable_key
from weightops.checkpoints.formats.pickle_objects import Global, StandIn, name_in_errors
from weightops.errors import CheckpointError
from weightops.support.budget import OBJECT, Budget
from weightops.support.text import first_few

_PYTHON_2_MODULES = {"__builtin__": "builtins", "copy_reg": "copyreg"}


class Unpickler:
    """Carries out the opcodes of one pickle.

    Args:
        stream: the bytes, from the pickle on; `load` leaves it right behind the pickle.
        persistent: persistent id -> object.
        budget: what may still be made of the file that holds the pickle.

    Attributes:
        refused_names: the names that the pickle asked for and didn't get, in order.
    """

    def __init__(self, stream: IO[bytes], persistent: Callable[[Any], Any], budget: Budget) -> None:
        self.refused_names: dict[str, None] = {}
        self._stream, self._persistent, self._budget = stream, persistent, budget
        self._stack: list[Any] = []
        self._marks: list[list[Any]] = []
        self._memo: list[Any] = []

    def load(self) -> Any:
        """Return the object: plain values, containers, `StoredTensor`, `StandIn` and `Global`.

        Raises:
            CheckpointError: if the bytes aren't a pickle, or a tensor's description isn't sound.
        """
        try:
            for opcode, argument, _ in pickletools.genops(self._stream):
                if opcode.name == "STOP":
                    return self._stack.pop()
                self._execute(opcode.name, argument)
        except CheckpointError as error:
            raise with_refused_names(error, self.refused_names) from error
        except Exception as error:  # damaged bytes lead to anything
            reason = str(error)[:200] or type(error).__name__
            damaged = CheckpointError(f"its pickle is damaged: {reason}")
            raise with_refused_names(damaged, self.refused_names) from error
        raise CheckpointError("its pickle has no end")

    def _execute(self, opcode: str, argument: Any) -> None:
        if opcode in _PLAIN:
            held = 0 if opcode == "BININT1" else sys.getsizeof(argument)  # Python has these once
            self._budget.spend(held + 8)
            self._stack.append(argument)
        elif opcode in _CONSTANTS:
            self._stack.append(_CONSTANTS[opcode])
        elif opcode in _EMPTY:
            self._budget.spend(OBJECT)
            self._stack.append(_EMPTY[opcode]())
        elif opcode in _FROM_MARK:
            items = self._to_mark()
            self._budget.spend(OBJECT)
            self._stack.append(_FROM_MARK[opcode](self, items))
        elif opcode in _TUPLES:
            self._budget.spend(OBJECT)
            count = _TUPLES[opcode]
            if len(self._stack) < count:
                raise IndexError("the stack is too short")
            self._stack[-count:] = [tuple(self._stack[-count:])]
        elif opcode in ("PUT", "BINPUT", "LONG_BINPUT"):
            self._remember(argument)
        elif opcode == "MEMOIZE":
            self._remember(len(self._memo))
        elif opcode in ("GET", "BINGET", "LONG_BINGET"):
            self._stack.append(self._remembered(argument))
        elif opcode not in ("PROTO", "FRAME", "READONLY_BUFFER"):
            _OPERATIONS[opcode](self, argument)

    # memo

    def _remember(self, index: int) -> None:
        gap = index - len(self._memo)
        if index < 0:
            raise LookupError("it remembers something at a negative place")
        if gap > 0:
            self._budget.spend(8 * gap)
            self._memo += [_NOTHING] * gap
        self._memo[index : index + 1] = [self._stack[-1]]

    def _remembered(self, index: int) -> Any:
        if index < 0 or self._memo[index] is _NOTHING:
            raise LookupError("it asks for what it never remembered")
        return self._memo[index]

    # stack

    def _mark(self, _: None) -> None:
        self._budget.spend(OBJECT)
        self._marks.append(self._stack)
        self._stack = []

    def _to_mark(self) -> list[Any]:
        """Take everything above the last mark from the stack."""
        items, self._stack = self._stack, self._marks.pop()
        self._budget.spend(-OBJECT)
        return items

    def _dup(self, _: None) -> None:
        self._stack.append(self._stack[-1])

    def _pop(self, _: None) -> None:
        if self._stack:
            self._stack.pop()
        else:
            self._to_mark()

    def _pop_mark(self, _: None) -> None:
        self._to_mark()

    def _next_buffer(self, _: None) -> None:
        self._budget.spend(OBJECT)
        self._stack.append(StandIn("a buffer outside the pickle"))

    # names

    def _named(self, module: str, name: str) -> Global:
        self._budget.spend(2 * OBJECT + len(module) + len(name))  # both may be remembered, and long
        path = f"{_PYTHON_2_MODULES.get(module, module)}.{name}"
        if path not in HARMLESS:
            self.refused_names[path] = None
        return Global(path)

    def _global(self, argument: str) -> None:
        self._stack.append(self._named(*argument.split(" ", 1)))

    def _stack_global(self, _: None) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise ValueError("a global without a name")
        self._stack.append(self._named(module, name))

    def _extension(self, code: int) -> None:
        self._stack.append(self._named("copyreg", f"extension {code}"))

    def _persid(self, pid: Any) -> None:
        self._budget.spend(2 * OBJECT)
        self._stack.append(self._persistent(pid))

    def _binpersid(self, _: None) -> None:
        self._persid(self._stack.pop())

    # calls

    def _call(self, function: Any, args: Any) -> None:
        self._budget.spend(OBJECT)
        if isinstance(function, Global) and function.name in HARMLESS and isinstance(args, tuple):
            self._budget.spend(8 * len(args))
            for arg in args:
                self._budget.spend(_items_of(arg))
        result = answer(name_in_errors(function), args, function)
        if isinstance(result, dict):
            self._budget.spend(OBJECT * len(result))
        self._stack.append(result)

    def _reduce(self, _: None) -> None:
        args, function = self._stack.pop(), self._stack.pop()
        self._call(function, args)

    def _newobj_ex(self, _: None) -> None:
        keywords, args, function = self._stack.pop(), self._stack.pop(), self._stack.pop()
        if keywords:
            self._budget.spend(OBJECT)
            self._stack.append(StandIn(name_in_errors(function), (args, keywords)))
        else:
            self._call(function, args)

    def _inst(self, argument: str) -> None:
        args = tuple(self._to_mark())
        self._call(self._named(*argument.split(" ", 1)), args)

    def _obj(self, _: None) -> None:
        function, *args = self._to_mark()
        self._call(function, tuple(args))

    def _build(self, _: None) -> None:
        state, target = self._stack.pop(), self._stack[-1]
        # Any other state is the attributes of a container, or the flags of a tensor.
        if isinstance(target, StandIn):
            target.state = state

    # containers

    def _append(self, _: None) -> None:
        self._extend([self._stack.pop()])

    def _appends(self, _: None) -> None:
        self._extend(self._to_mark())

    def _extend(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if not isinstance(target, (list, StandIn)):
            raise TypeError(f"{name_in_errors(target)} can't be appended to")
        target.extend(items)

    def _setitem(self, _: None) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._update([key, value])

    def _setitems(self, _: None) -> None:
        self._update(self._to_mark())

    def _update(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if not isinstance(target, (dict, StandIn)):
            raise TypeError(f"{name_in_errors(target)} can't be given items")
        target.update(self._pairs(items))

    def _dict(self, items: list[Any]) -> dict[Any, Any]:
        return dict(self._pairs(items))

    def _pairs(self, items: list[Any]) -> Iterator[tuple[Any, Any]]:
        if len(items) % 2:
            raise ValueError("a key without a value")
        self._budget.spend(OBJECT // 2 * len(items))
        for place in range(0, len(items), 2):
            key = hashable_key(items[place])
            if key is not items[place]:
                self._budget.spend(OBJECT)
            yield key, items[place + 1]


def with_refused_names(error: CheckpointError, names: Mapping[str, None]) -> CheckpointError:
    """Return the error with a list of the names that a pickle asked for and didn't get."""
    asked = first_few(name[:200] for name in names)
    why = f"; it asks for {asked}, and weightops runs nothing that a file asks for"
    return CheckpointError(error.fact + (why if names else ""), hint=error.hint)


def _items_of(argument: Any) -> int:
    """Return how many items a call may copy or look at, those of inner arguments included."""
    if isinstance(argument, tuple):
        return len(argument) + sum(len(a) for a in argument if isinstance(a, (list, dict, tuple)))
    return 16 * len(argument) if isinstance(argument, (list, dict)) else 0


_NOTHING = object()
"""Holds the place of what was never remembered."""

_PLAIN = set(
    [
        "INT",
        "BININT",
        "BININT1",
        "BININT2",
        "LONG",
        "LONG1",
        "LONG4",
        "FLOAT",
        "BINFLOAT",
        "STRING",
        "BINSTRING",
        "SHORT_BINSTRING",
        "UNICODE",
        "SHORT_BINUNICODE",
        "BINUNICODE",
        "BINUNICODE8",
        "BINBYTES",
        "SHORT_BINBYTES",
        "BINBYTES8",
        "BYTEARRAY8",
    ]
)
"""Opcodes whose argument is the object."""

_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY: dict[str, Callable[[], Any]] = {
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_TUPLE": tuple,
    "EMPTY_SET": list,
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_FROM_MARK: dict[str, Callable[[Unpickler, list[Any]], Any]] = {
    "LIST": lambda _, items: items,
    "TUPLE": lambda _, items: tuple(items),
    "FROZENSET": lambda _, items: items,
    "DICT": Unpickler._dict,
}
_OPERATIONS: dict[str, Callable[[Unpickler, Any], None]] = {
    "MARK": Unpickler._mark,
    "DUP": Unpickler._dup,
    "POP": Unpickler._pop,
    "POP_MARK": Unpickler._pop_mark,
    "NEXT_BUFFER": Unpickler._next_buffer,
    "GLOBAL": Unpickler._global,
    "STACK_GLOBAL": Unpickler._stack_global,
    "EXT1": Unpickler._extension,
    "EXT2": Unpickler._extension,
    "EXT4": Unpickler._extension,
    "PERSID": Unpickler._persid,
    "BINPERSID": Unpickler._binpersid,
    "REDUCE": Unpickler._reduce,
    "NEWOBJ": Unpickler._reduce,
    "NEWOBJ_EX": Unpickler._newobj_ex,
    "INST": Unpickler._inst,
    "OBJ": Unpickler._obj,
    "BUILD": Unpickler._build,
    "APPEND": Unpickler._append,
    "APPENDS": Unpickler._appends,
    "ADDITEMS": Unpickler._appends,
    "SETITEM": Unpickler._setitem,
    "SETITEMS": Unpickler._setitems,
}
