"""Weights that are in memory: state dicts and modules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from weightops.errors import CheckpointError
from weightops.expression import Source, Spec


class MemorySource(Source):
    """A mapping of tensors, referred to and not copied."""

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor],
        ref: str,
        *,
        passed_over: tuple[str, ...] = (),
        identity: object = None,
    ) -> None:
        self._tensors = dict(tensors)
        self.ref = ref
        self.specs = {name: Spec(tuple(t.shape), t.dtype) for name, t in self._tensors.items()}
        self.ties = _ties(self._tensors)
        self.passed_over = passed_over
        self.identity = identity or tuple((name, *_memory(t)) for name, t in self._tensors.items())

    def read(self, name: str) -> torch.Tensor:
        return self._tensors[name]

    def shares_memory_with(self, tensors: Mapping[str, torch.Tensor]) -> bool:
        """True if any tensor lies in the same storage as one of ``tensors``."""
        mine = {t.untyped_storage().data_ptr() for t in self._tensors.values() if t.numel()}
        return any(t.untyped_storage().data_ptr() in mine for t in tensors.values() if t.numel())


def _memory(t: torch.Tensor) -> tuple[Any, ...]:
    return t.data_ptr(), t.device, tuple(t.shape), tuple(t.stride()), t.dtype


def _ties(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    first: dict[tuple[Any, ...], str] = {}
    ties = {}
    for name, tensor in tensors.items():
        if tensor.numel() and tensor.device.type != "meta":
            owner = first.setdefault(_memory(tensor), name)
            if owner != name:
                ties[name] = owner
    return ties


def from_dict(tensors: Mapping[str, Any], ref: str = "a state dict") -> MemorySource:
    """The source of a state dict.

    Raises:
        CheckpointError: if a value isn't a dense tensor.
    """
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise CheckpointError(
                f"{ref} holds {type(tensor).__name__} at {name!r}; a state dict maps names to tensors"
            )
        if tensor.layout != torch.strided or tensor.is_quantized:
            raise CheckpointError(
                f"{ref} holds a {'quantised' if tensor.is_quantized else tensor.layout} tensor at {name}; make it dense"
            )
        if tensor.device.type == "meta":
            raise CheckpointError(f"{name} of {ref} is on the meta device and holds no data")
    return MemorySource(tensors, ref)


def from_module(module: nn.Module) -> MemorySource:
    """The source of a module's parameters and persistent buffers."""
    return from_dict(module.state_dict(), type(module).__name__)
