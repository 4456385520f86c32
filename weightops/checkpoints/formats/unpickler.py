"""A reader of pickles that runs nothing: every name in them stays a name, every call a record of what was asked for.

The opcodes are carried out on plain lists and dicts. A call is answered by one of the functions of `CALLS`, all
of which are in this file and build descriptions of tensors and plain containers; any other gives a `StandIn`.
"""

from __future__ import annotations

import math
import pickletools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import IO, Any, NamedTuple

import torch

from weightops.errors import CheckpointError
from weightops.support.text import first_few

NAMED_DTYPES = {
    str(value): value
    for name, value in sorted(vars(torch).items())
    if isinstance(value, torch.dtype)
}
"""``torch.float32`` and the like, by what pickles call them."""

STORAGES = {
    f"torch.{name}Storage": dtype
    for name, dtype in {
        "Double": torch.float64,
        "Float": torch.float32,
        "Half": torch.float16,
        "BFloat16": torch.bfloat16,
        "Long": torch.int64,
        "Int": torch.int32,
        "Short": torch.int16,
        "Char": torch.int8,
        "Byte": torch.uint8,
        "Bool": torch.bool,
        "ComplexDouble": torch.complex128,
        "ComplexFloat": torch.complex64,
    }.items()
} | {"torch.UntypedStorage": torch.uint8, "torch.storage.UntypedStorage": torch.uint8}
"""Classes of storages that tensors can be rebuilt from, and what they hold."""


class Global(NamedTuple):
    """A name that a pickle asks for. It is never looked up."""

    name: str


@dataclass(eq=False, slots=True)
class StandIn:
    """An object that wasn't made: what was to be called with what, and what was to be put into it."""

    name: str
    args: Any = ()
    state: Any = None
    items: list[Any] = field(default_factory=list)
    mapping: dict[Any, Any] = field(default_factory=dict)


class Storage(NamedTuple):
    """Bytes of a file: the key they are kept under, and a range of elements in it."""

    key: str
    dtype: torch.dtype
    start: int
    numel: int


class StoredTensor(NamedTuple):
    """A strided view of a storage; two with equal fields are one tensor."""

    storage: Storage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """How many bytes it takes when it is made dense."""
        return math.prod(self.shape) * self.dtype.itemsize


# ------------------------------------------------------- calls that are answered


def tensor(
    storage: Any, offset: Any, shape: Any, stride: Any, *rest: Any, dtype: torch.dtype | None = None
) -> StoredTensor:
    """Describe a tensor, once its numbers are found to lie in its storage.

    Raises:
        CheckpointError: if they don't.
    """
    if not isinstance(storage, Storage):
        raise CheckpointError(f"a tensor is made from {_called(storage)}, not from a storage")
    sizes, strides = (
        value if isinstance(value, tuple) else () if value is None else None
        for value in (shape, stride)
    )
    if sizes is None or strides is None or len(sizes) != len(strides) or len(sizes) > 64:
        raise CheckpointError(f"a tensor of storage {storage.key!r} has no sound shape and strides")
    if not all(type(n) is int and 0 <= n < 2**62 for n in (offset, *sizes, *strides)):
        raise CheckpointError(
            f"a tensor of storage {storage.key!r} has sizes, strides or an offset that can't be"
        )
    if any(isinstance(extra, Mapping) and any(extra.values()) for extra in rest[2:]):
        raise CheckpointError(
            f"a tensor of storage {storage.key!r} is stored conjugated or negated; resolve it first"
        )
    kind = dtype or storage.dtype
    room = storage.numel * storage.dtype.itemsize // kind.itemsize
    last = offset + sum((n - 1) * step for n, step in zip(sizes, strides, strict=True))
    if 0 not in sizes and last >= room:
        raise CheckpointError(
            f"a tensor reaches to element {last} of storage {storage.key!r}, which has {room}"
        )
    return StoredTensor(storage, kind, offset, sizes, strides)


def _tensor_v3(
    storage: Any,
    offset: Any,
    shape: Any,
    stride: Any,
    grad: Any,
    hooks: Any,
    dtype: Any,
    *rest: Any,
) -> StoredTensor:
    kind = NAMED_DTYPES.get(dtype.name) if isinstance(dtype, Global) else None
    if kind is None:
        raise CheckpointError(f"a tensor is of dtype {_called(dtype)}, which isn't known")
    return tensor(storage, offset, shape, stride, grad, hooks, *rest, dtype=kind)


def _typed(function: Any, kind: Any, args: Any, state: Any = None) -> Any:
    known = isinstance(function, Global) and function.name in CALLS
    if known and isinstance(kind, Global) and kind.name in _TENSOR_CLASSES:
        return _answer(function.name, args, None)
    return StandIn(_called(kind), (args, state))


def _first(value: Any = None, *rest: Any) -> Any:
    return value


def _new(kind: Any, *args: Any) -> Any:
    return _answer(_called(kind), args, kind)


def _object(kind: Any, base: Any = None, state: Any = None) -> StandIn:
    return StandIn(_called(kind), state)


_TENSOR_CLASSES = ("torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer")

CALLS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": tensor,
    "torch._utils._rebuild_tensor_v2": tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._tensor._rebuild_from_type_v2": _typed,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch.nn.parameter.Parameter": _first,
    "torch.nn.parameter.Buffer": _first,
    "torch.autograd.variable.Variable": _first,
    "torch.Size": _first,
    "torch.jit._pickle.restore_type_tag": _first,
    "torch.jit._pickle.build_intlist": _first,
    "torch.jit._pickle.build_doublelist": _first,
    "torch.jit._pickle.build_boollist": _first,
    "torch.jit._pickle.build_tensorlist": _first,
    "_codecs.encode": _first,
    "copyreg.__newobj__": _new,
    "copyreg._reconstructor": _object,
}
"""The calls that are answered, each by a function of this file. Dicts and sets are beside them: see `_CONTAINERS`."""

_CONTAINERS: dict[str, type[Any]] = {
    "collections.OrderedDict": dict,
    "collections.defaultdict": dict,
    "builtins.dict": dict,
    "builtins.list": list,
    "builtins.set": list,
    "builtins.frozenset": list,
}

_MOVED = {"__builtin__": "builtins", "copy_reg": "copyreg"}
"""What Python 2 called modules."""

_HARMLESS = {*CALLS, *_CONTAINERS, *STORAGES, *NAMED_DTYPES, *_TENSOR_CLASSES, "builtins.object"}


def _called(value: Any) -> str:
    """What an error calls a value."""
    return str(value.name) if isinstance(value, (Global, StandIn)) else f"a {type(value).__name__}"


def _answer(name: str, args: Any, function: Any) -> Any:
    """The result of a listed call, or a stand-in for any other."""
    if name in _CONTAINERS and (function is None or isinstance(function, Global)):
        return _container(_CONTAINERS[name], args)
    known = CALLS.get(name) if function is None or isinstance(function, Global) else None
    if known is None or not isinstance(args, tuple):
        return StandIn(name, args)
    try:
        return known(*args)
    except TypeError:
        raise CheckpointError(
            f"{name} is called with {len(args)} arguments that it doesn't take"
        ) from None


def _container(kind: type[Any], args: Any) -> Any:
    """A new dict or list, of the pairs or items given."""
    given = (
        args[-1] if isinstance(args, tuple) and args and isinstance(args[-1], (list, dict)) else []
    )
    if kind is list:
        return list(given)
    pairs = (
        given.items()
        if isinstance(given, dict)
        else (p for p in given if isinstance(p, (list, tuple)) and len(p) == 2)
    )
    return {_key(k): v for k, v in pairs}


def _key(value: Any) -> Any:
    """A dict's key: plain values and stand-ins are their own; what else there may be is never hashed."""
    plain = isinstance(value, (str, int, float, bool, type(None), bytes, Global, StandIn))
    return value if plain else StandIn("a key", (value,))


# ------------------------------------------------------------------ the machine


class Unpickler:
    """Carries out the opcodes of one pickle.

    Args:
        stream: where it begins; afterwards right behind it.
        persistent: persistent id -> object.
        limit: how many items calls may copy; a sound pickle has a byte for each at least.

    Attributes:
        names: all that the pickle asked for by name and didn't get, in order.
    """

    def __init__(self, stream: IO[bytes], persistent: Callable[[Any], Any], limit: int) -> None:
        self.names: dict[str, None] = {}
        self._stream, self._persistent, self._limit = stream, persistent, limit
        self._stack: list[Any] = []
        self._marks: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def load(self) -> Any:
        """The object, of dicts, lists, tuples, plain values, `StoredTensor`, `StandIn` and `Global`.

        Raises:
            CheckpointError: if the bytes aren't a pickle, or a tensor's description can't be.
        """
        try:
            for opcode, argument, _ in pickletools.genops(self._stream):
                if opcode.name == "STOP":
                    return self._stack.pop()
                self._do(opcode.name, argument)
        except CheckpointError as error:
            raise CheckpointError(f"{error}{asked_for(self.names)}") from error
        except Exception as error:  # damaged bytes lead to anything
            reason = str(error)[:200] or type(error).__name__
            raise CheckpointError(
                f"its pickle is damaged: {reason}{asked_for(self.names)}"
            ) from error
        raise CheckpointError("its pickle has no end")

    def _do(self, name: str, argument: Any) -> None:
        stack = self._stack
        if name in _PLAIN:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name]())
        elif name == "MARK":
            self._marks.append(stack)
            self._stack = []
        elif name in _FROM_MARK:
            items = self._to_mark()
            self._stack.append(_FROM_MARK[name](items))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(name[-1])
            if len(stack) < count:
                raise IndexError("the stack is too short")
            stack[-count:] = [tuple(stack[-count:])]
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            self._memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            self._memo[len(self._memo)] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(self._memo[argument])
        elif name not in ("PROTO", "FRAME", "READONLY_BUFFER"):
            getattr(self, f"_{name.lower()}")(argument)

    def _to_mark(self) -> list[Any]:
        items, self._stack = self._stack, self._marks.pop()
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
        self._stack.append(StandIn("a buffer outside the pickle"))

    # names

    def _named(self, module: str, name: str) -> Global:
        name = f"{_MOVED.get(module, module)}.{name}"
        if name not in _HARMLESS:
            self.names[name] = None
        return Global(name)

    def _global(self, argument: str) -> None:
        self._stack.append(self._named(*argument.split(" ", 1)))

    def _stack_global(self, _: None) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise ValueError("a global without a name")
        self._stack.append(self._named(module, name))

    def _ext1(self, code: int) -> None:
        self._stack.append(self._named("copyreg", f"extension {code}"))

    _ext2 = _ext4 = _ext1

    def _persid(self, pid: Any) -> None:
        self._stack.append(self._persistent(pid))

    def _binpersid(self, _: None) -> None:
        self._stack.append(self._persistent(self._stack.pop()))

    # calls

    def _call(self, function: Any, args: Any) -> None:
        if isinstance(function, Global) and function.name in _HARMLESS and isinstance(args, tuple):
            self._limit -= sum(len(given) for given in args if isinstance(given, (list, dict)))
            if self._limit < 0:
                raise CheckpointError("its pickle copies more than it holds")
        self._stack.append(_answer(_called(function), args, function))

    def _reduce(self, _: None) -> None:
        args, function = self._stack.pop(), self._stack.pop()
        self._call(function, args)

    _newobj = _reduce

    def _newobj_ex(self, _: None) -> None:
        named, args, function = self._stack.pop(), self._stack.pop(), self._stack.pop()
        if named:
            self._stack.append(StandIn(_called(function), (args, named)))
        else:
            self._call(function, args)

    def _inst(self, argument: str) -> None:
        args = tuple(self._to_mark())
        self._call(self._named(*argument.split(" ", 1)), args)

    def _obj(self, _: None) -> None:
        function, *args = self._to_mark()
        self._call(function, tuple(args))

    def _build(self, _: None) -> None:
        state = self._stack.pop()
        if isinstance(self._stack[-1], StandIn):
            self._stack[
                -1
            ].state = state  # what else is built is a container's attributes or a tensor's flags

    # filling containers

    def _append(self, _: None) -> None:
        self._extend([self._stack.pop()])

    def _appends(self, _: None) -> None:
        self._extend(self._to_mark())

    _additems = _appends

    def _extend(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if not isinstance(target, (list, StandIn)):
            raise TypeError(f"{_called(target)} can't be appended to")
        (target.items if isinstance(target, StandIn) else target).extend(items)

    def _setitem(self, _: None) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._update([key, value])

    def _setitems(self, _: None) -> None:
        self._update(self._to_mark())

    def _update(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if not isinstance(target, (dict, StandIn)):
            raise TypeError(f"{_called(target)} can't be given items")
        (target.mapping if isinstance(target, StandIn) else target).update(_pairs(items))


def asked_for(names: Mapping[str, None]) -> str:
    """What an error adds of the names that weren't given."""
    return (
        f"; it asks for {first_few(name[:200] for name in names)}, and weightops runs nothing that a file asks for"
        if names
        else ""
    )


def _pairs(items: list[Any]) -> Iterator[tuple[Any, Any]]:
    if len(items) % 2:
        raise ValueError("a key without a value")
    return ((_key(key), value) for key, value in zip(items[::2], items[1::2], strict=True))


_PLAIN = {
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
}
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_TUPLE": tuple,
    "EMPTY_SET": list,
}
_FROM_MARK: dict[str, Callable[[list[Any]], Any]] = {
    "LIST": list,
    "TUPLE": tuple,
    "FROZENSET": list,
    "DICT": lambda items: dict(_pairs(items)),
}
