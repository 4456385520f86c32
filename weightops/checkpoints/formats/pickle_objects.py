"""The objects that `Unpickler` builds: descriptions of tensors, and stand-ins for all else."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from weightops.algebra.dtypes import ITEM_SIZES

NAMED_DTYPES = {f"torch.{name}": name for name in ITEM_SIZES}
"""The name of a dtype in pickles, such as ``torch.float32`` -> its short name."""

STORAGES = {
    "torch.DoubleStorage": "float64",
    "torch.FloatStorage": "float32",
    "torch.HalfStorage": "float16",
    "torch.BFloat16Storage": "bfloat16",
    "torch.LongStorage": "int64",
    "torch.IntStorage": "int32",
    "torch.ShortStorage": "int16",
    "torch.CharStorage": "int8",
    "torch.ByteStorage": "uint8",
    "torch.BoolStorage": "bool",
    "torch.ComplexDoubleStorage": "complex128",
    "torch.ComplexFloatStorage": "complex64",
    "torch.UntypedStorage": "uint8",
    "torch.storage.UntypedStorage": "uint8",
}
"""The name of a class of storages in pickles -> the short name of the dtype of its elements."""


class Global(NamedTuple):
    """A name that a pickle asks for. The name is never looked up."""

    name: str


@dataclass(eq=False, slots=True, repr=False)
class StandIn:
    """A record of an object that a pickle wanted built.

    Attributes:
        name: the name of the function or class that was to be called.
        args: the arguments of the call.
        state: the state that was to be set.
        items: the items that were to be appended, if any.
        mapping: the items that were to be set by key, if any.
    """

    name: str
    args: Any = ()
    state: Any = None
    items: list[Any] | None = None
    mapping: dict[Any, Any] | None = None

    def extend(self, items: Iterable[Any]) -> None:
        """Append items."""
        self.items = self.items or []
        self.items.extend(items)

    def update(self, pairs: Iterable[tuple[Any, Any]]) -> None:
        """Set items by key."""
        self.mapping = self.mapping or {}
        self.mapping.update(pairs)

    def __repr__(self) -> str:
        """Return the name alone: what is shared again and again would be printed as often."""
        return f"StandIn({self.name[:200]!r})"


class Storage(NamedTuple):
    """A range of elements among the bytes that a file keeps under a key."""

    key: str
    dtype: str
    start: int
    numel: int

    @property
    def itemsize(self) -> int:
        """The bytes of one element."""
        return ITEM_SIZES[self.dtype]


class StoredTensor(NamedTuple):
    """A strided view of a storage; two with equal fields are one tensor."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def __hash__(self) -> int:
        """Return a hash that a file's author can't foresee, unlike that of numbers."""
        return hash(repr(self))

    @property
    def itemsize(self) -> int:
        """The bytes of one element."""
        return ITEM_SIZES[self.dtype]

    @property
    def nbytes(self) -> int:
        """The number of bytes of the tensor when it is made dense."""
        return math.prod(self.shape) * self.itemsize


def short_name(value: Any) -> str:
    """Return a key or name as text, cut off; a word for what is neither text nor a number."""
    if isinstance(value, int) and value.bit_length() > 64:
        return "a large number"
    return str(value)[:200] if isinstance(value, (str, int)) else name_in_errors(value)


def name_in_errors(value: Any) -> str:
    """Return the name of an object of a pickle in errors."""
    return str(value.name) if isinstance(value, (Global, StandIn)) else f"a {type(value).__name__}"
