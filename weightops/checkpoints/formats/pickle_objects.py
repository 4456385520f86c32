"""The objects that `Unpickler` builds: descriptions of tensors, and stand-ins for all else."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

NAMED_DTYPES = {
    str(value): value
    for name, value in sorted(vars(torch).items())
    if isinstance(value, torch.dtype)
}
"""The name of a dtype in pickles, such as ``torch.float32`` -> the dtype."""

STORAGES = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
    "torch.ComplexDoubleStorage": torch.complex128,
    "torch.ComplexFloatStorage": torch.complex64,
    "torch.UntypedStorage": torch.uint8,
    "torch.storage.UntypedStorage": torch.uint8,
}
"""The name of a class of storages in pickles -> the dtype of its elements."""


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
        items: the items that were to be appended.
        mapping: the items that were to be set by key.
    """

    name: str
    args: Any = ()
    state: Any = None
    items: list[Any] = field(default_factory=list)
    mapping: dict[Any, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        """Return the name alone: what is shared again and again would be printed as often."""
        return f"StandIn({self.name[:200]!r})"


class Storage(NamedTuple):
    """A range of elements among the bytes that a file keeps under a key."""

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
        """The number of bytes of the tensor when it is made dense."""
        return math.prod(self.shape) * self.dtype.itemsize


def short_name(value: Any) -> str:
    """Return a key or name as text, cut off; a word for what is neither text nor a number."""
    if isinstance(value, int) and value.bit_length() > 64:
        return "a large number"
    return str(value)[:200] if isinstance(value, (str, int)) else name_in_errors(value)


def name_in_errors(value: Any) -> str:
    """Return the name of an object of a pickle in errors."""
    return str(value.name) if isinstance(value, (Global, StandIn)) else f"a {type(value).__name__}"
