"""Weights in memory: state dicts and modules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from weightops.algebra.source import Source, Spec
from weightops.errors import CheckpointError
from weightops.support.lazy import torch


class _Place(NamedTuple):
    """The place of a tensor's elements."""

    address: int
    device: torch.device
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype


class MemorySource(Source):
    """The tensors of a mapping, referred to and not copied, but for lazy conjugates and negatives.

    Args:
        tensors: name -> tensor.
        ref: the name of the tensors in messages and provenance.
        record: what `describe` says of them, beside their name and fingerprint.
        identity: equal for two sources only if they hold the same tensors; by default it is found
            from the tensors' places in memory.

    Raises:
        CheckpointError: if a value isn't a tensor whose elements can be read in place.
    """

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor],
        ref: str,
        *,
        record: Mapping[str, object] | None = None,
        identity: object = None,
    ) -> None:
        self._tensors, self._record = dict(tensors), dict(record or {})
        self.ref = ref
        self.specs: dict[str, Spec] = {}
        places: dict[str, _Place] = {}
        for name, tensor in self._tensors.items():
            if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
                raise CheckpointError(
                    f"{ref} holds {type(tensor).__name__} at {name!r}",
                    hint="a state dict maps names to tensors",
                )
            unreadable = _unreadable_kind(tensor)
            if unreadable:
                raise CheckpointError(
                    f"{ref} holds a {unreadable} tensor at {name}",
                    hint="make it dense and put it in memory: dequantize(), full_tensor()",
                )
            # A view that conjugates or negates lazily is in the place of what it is a view of.
            tensor = self._tensors[name] = tensor.resolve_conj().resolve_neg()
            shape, dtype = tensor.shape, tensor.dtype
            self.specs[name] = Spec(tuple(shape), dtype)
            places[name] = _Place(tensor.data_ptr(), tensor.device, shape, tensor.stride(), dtype)
        self.ties = _find_ties(places)
        self.identity = identity or tuple(places.items())

    def read(self, name: str) -> torch.Tensor:
        return self._tensors[name]

    @property
    def fingerprint(self) -> str:
        """16 hex digits that identify the present values, which the tensors' owner may change."""
        return self.sample_fingerprint()

    def describe(self) -> dict[str, object]:
        """Return the description that every source has, and the record."""
        return {**super().describe(), **self._record}

    def shares_memory_with(self, tensors: Mapping[str, torch.Tensor]) -> bool:
        """Return whether any tensor is in the same storage as one of ``tensors``."""
        mine = {t.untyped_storage().data_ptr() for t in self._tensors.values() if t.numel()}
        return any(t.untyped_storage().data_ptr() in mine for t in tensors.values() if t.numel())


def _unreadable_kind(tensor: torch.Tensor) -> str | None:
    """Return the kind of a tensor whose elements can't be read in place; None for other tensors."""
    if tensor.is_meta:
        return "meta"
    if hasattr(tensor, "__tensor_flatten__"):  # made of others: torchao's, or torch's DTensor
        return type(tensor.detach()).__name__
    if tensor.is_quantized:
        return "quantised"
    if tensor.is_nested:
        return "nested"
    return None if tensor.layout == torch.strided else str(tensor.layout).removeprefix("torch.")


def _find_ties(places: Mapping[str, _Place]) -> dict[str, str]:
    """Return alias -> name for tensors in the same place; empty tensors are never tied."""
    owners: dict[_Place, str] = {}
    ties = {}
    for name, place in places.items():
        if place.shape.numel() and owners.setdefault(place, name) != name:
            ties[name] = owners[place]
    return ties
