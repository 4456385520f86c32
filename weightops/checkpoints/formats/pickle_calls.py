"""The answers to the calls in pickles: descriptions of tensors, and plain containers.

Nothing is executed. All functions that answer calls are in this file; a call that isn't listed
gives a `StandIn`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from weightops.algebra.dtypes import ITEM_SIZES
from weightops.checkpoints.formats.pickle_objects import (
    NAMED_DTYPES,
    STORAGES,
    Global,
    StandIn,
    Storage,
    StoredTensor,
    name_in_errors,
)
from weightops.errors import CheckpointError


def stored_tensor(
    storage: Any, offset: Any, shape: Any, stride: Any, *rest: Any, dtype: str | None = None
) -> StoredTensor:
    """Describe a tensor after a check that all its elements are in its storage.

    Raises:
        CheckpointError: if the description isn't sound.
    """
    if not isinstance(storage, Storage):
        raise CheckpointError(
            f"a tensor is made from {name_in_errors(storage)}, not from a storage"
        )
    place = f"a tensor of storage {storage.key!r}"
    sizes, strides = _dimensions(shape), _dimensions(stride)
    if sizes is None or strides is None or len(sizes) != len(strides) or len(sizes) > 64:
        raise CheckpointError(f"{place} has no sound shape and strides")
    if not all(type(n) is int and 0 <= n < 2**62 for n in (offset, *sizes, *strides)):
        raise CheckpointError(f"{place} has sizes, strides or an offset that can't be")
    if any(isinstance(extra, Mapping) and any(extra.values()) for extra in rest[2:]):
        raise CheckpointError(
            f"{place} is stored conjugated or negated",
            hint="save it after resolve_conj() and resolve_neg()",
        )
    element = dtype or storage.dtype
    capacity = storage.numel * storage.itemsize // ITEM_SIZES[element]
    last = offset + sum((n - 1) * step for n, step in zip(sizes, strides, strict=True))
    if 0 not in sizes and last >= capacity:
        raise CheckpointError(
            f"a tensor reaches to element {last} of storage {storage.key!r}, which has {capacity}"
        )
    return StoredTensor(storage, element, offset, sizes, strides)


def _dimensions(value: Any) -> tuple[Any, ...] | None:
    """Return a shape or strides, of which pickles may have none; None if the value is neither."""
    if value is None:
        return ()
    return value if isinstance(value, tuple) else None


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
    element = NAMED_DTYPES.get(dtype.name) if isinstance(dtype, Global) else None
    if element is None:
        raise CheckpointError(f"a tensor is of dtype {name_in_errors(dtype)}, which isn't known")
    return stored_tensor(storage, offset, shape, stride, grad, hooks, *rest, dtype=element)


def _tensor_of_class(function: Any, kind: Any, args: Any, state: Any = None) -> Any:
    rebuilds = isinstance(function, Global) and function.name in _REBUILDS
    if rebuilds and isinstance(kind, Global) and kind.name in _TENSOR_CLASSES:
        return answer(function.name, args, None)
    return StandIn(name_in_errors(kind), (args, state))


def _first_argument(value: Any = None, *rest: Any) -> Any:
    return value


def _new_object(kind: Any, *args: Any) -> Any:
    is_class = isinstance(kind, Global) and kind.name in _CONTAINERS
    return answer(kind.name, args, kind) if is_class else StandIn(name_in_errors(kind), args)


def _reconstructed(kind: Any, base: Any = None, state: Any = None) -> StandIn:
    return StandIn(name_in_errors(kind), state)


_REBUILDS = {f"torch._utils._rebuild_{kind}" for kind in ("tensor", "tensor_v2", "tensor_v3")}
_TENSOR_CLASSES = ("torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer")

CALLS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": stored_tensor,
    "torch._utils._rebuild_tensor_v2": stored_tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._tensor._rebuild_from_type_v2": _tensor_of_class,
    "torch._utils._rebuild_parameter": _first_argument,
    "torch._utils._rebuild_parameter_with_state": _first_argument,
    "torch.nn.parameter.Parameter": _first_argument,
    "torch.nn.parameter.Buffer": _first_argument,
    "torch.autograd.variable.Variable": _first_argument,
    "torch.Size": _first_argument,
    "torch.jit._pickle.restore_type_tag": _first_argument,
    "torch.jit._pickle.build_intlist": _first_argument,
    "torch.jit._pickle.build_doublelist": _first_argument,
    "torch.jit._pickle.build_boollist": _first_argument,
    "torch.jit._pickle.build_tensorlist": _first_argument,
    "_codecs.encode": _first_argument,
    "copyreg.__newobj__": _new_object,
    "copyreg._reconstructor": _reconstructed,
}
"""Name -> the function of this file that answers the call. See also `_CONTAINERS`."""

_CONTAINERS: dict[str, type[Any]] = {
    "collections.OrderedDict": dict,
    "collections.defaultdict": dict,
    "builtins.dict": dict,
    "builtins.list": list,
    "builtins.set": list,
    "builtins.frozenset": list,
}

HARMLESS = {*CALLS, *_CONTAINERS, *STORAGES, *NAMED_DTYPES, *_TENSOR_CLASSES, "builtins.object"}
"""The names that sound files ask for."""


def answer(name: str, args: Any, function: Any) -> Any:
    """Return the result of a listed call, or a stand-in for any other call.

    Args:
        name: the name that is called.
        args: the arguments; anything but a tuple gives a stand-in.
        function: the object that is called, which must be a `Global`; None if the caller checked.

    Raises:
        CheckpointError: if a listed call has the wrong number of arguments, or describes a tensor
            that isn't sound.
    """
    is_name = function is None or isinstance(function, Global)
    if is_name and name in _CONTAINERS:
        return _container(_CONTAINERS[name], args)
    known = CALLS.get(name) if is_name else None
    if known is None or not isinstance(args, tuple):
        return StandIn(name, args)
    try:
        return known(*args)
    except TypeError:
        raise CheckpointError(
            f"{name} is called with {len(args)} arguments that it doesn't take"
        ) from None


def _container(kind: type[Any], args: Any) -> Any:
    """Return a new dict or list of the pairs or items in the last argument."""
    content = args[-1] if isinstance(args, tuple) and args else []
    if not isinstance(content, (list, dict)):
        content = []
    if kind is list:
        return list(content)
    pairs = content.items() if isinstance(content, dict) else content
    return {
        hashable_key(pair[0]): pair[1]
        for pair in pairs
        if isinstance(pair, (list, tuple)) and len(pair) == 2
    }


def hashable_key(value: Any) -> Any:
    """Return a plain value or stand-in as it is, and a stand-in for any other key of a dict.

    Other keys are never hashed, as that may take very long: of nested tuples, and of numbers that
    are chosen so that their places in a dict collide.
    """
    if isinstance(value, int):
        return value if value.bit_length() <= 16 else StandIn("a key", value)
    plain = isinstance(value, (str, type(None), bytes, Global, StandIn))
    return value if plain else StandIn("a key", value)
