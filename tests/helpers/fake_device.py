"""A device that isn't there: its tensors compute on CPU, and refuse tensors of other devices."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map, tree_map_only

THERE = torch.device("lazy", 0)  # a type that torch knows, and needs no driver to name
MOVES = ("aten::_to_copy", "aten::copy_")


class Elsewhere(torch.Tensor):
    """A tensor that computes on CPU and claims to be on the device."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Elsewhere:
        tensor: Elsewhere = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=THERE,
        )  # type: ignore[attr-defined]
        tensor.inner = inner
        return tensor

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})


def compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operator on the inner tensors, if a real device would run it."""
    given: list[torch.Tensor] = []
    tree_map_only(torch.Tensor, given.append, (args, kwargs))
    name = func._schema.name
    wanted = kwargs.get("device")
    there = any(isinstance(tensor, Elsewhere) for tensor in given)
    if there and name not in MOVES:
        strangers = [t for t in given if not isinstance(t, Elsewhere) and t.dim()]
        assert not strangers, f"{name} of tensors on two devices"
    if wanted is not None:
        there = torch.device(wanted).type == THERE.type
        kwargs = {
            **kwargs,
            "device": torch.device("cpu"),
            **({"pin_memory": False} if "pin_memory" in kwargs else {}),
        }
    owners = {id(t.inner): t for t in given if isinstance(t, Elsewhere)}
    result = func(*tree_map(_unwrap, args), **tree_map(_unwrap, kwargs))
    if name == "aten::copy_":
        return args[0]
    if name == "aten::_to_copy" and wanted is not None and result is _unwrap(args[0]):
        result = result.clone()
    if not there:
        return result

    def wrap(tensor: torch.Tensor) -> torch.Tensor:
        return owners[id(tensor)] if id(tensor) in owners else Elsewhere(tensor)

    return tree_map_only(torch.Tensor, wrap, result)


def _unwrap(value: Any) -> Any:
    return value.inner if isinstance(value, Elsewhere) else value


class Device(TorchDispatchMode):
    """A mode in which tensors that are created on the device compute on CPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})
