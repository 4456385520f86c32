"""Weights that are in memory: state dicts and modules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from weightops.algebra.source import Source, Spec
from weightops.errors import CheckpointError


class MemorySource(Source):
    """A mapping of tensors, referred to and not copied.

    Raises:
        CheckpointError: if a value isn't a tensor whose elements can be read in place.
    """

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
        self.specs: dict[str, Spec] = {}
        places: dict[str, tuple[Any, ...]] = {}
        for name, tensor in self._tensors.items():
            if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
                raise CheckpointError(
                    f"{ref} holds {type(tensor).__name__} at {name!r}; a state dict maps names to tensors"
                )
            kind = _unusable(tensor)
            if kind:
                raise CheckpointError(
                    f"{ref} holds a {kind} tensor at {name}; make it dense and put it in memory"
                )
            shape, dtype = tensor.shape, tensor.dtype
            self.specs[name] = Spec(tuple(shape), dtype)
            places[name] = (tensor.data_ptr(), tensor.device, shape, tensor.stride(), dtype)
        self.ties = _ties(places)
        self.skipped = passed_over
        self.identity = identity or tuple(places.items())

    def read(self, name: str) -> torch.Tensor:
        return self._tensors[name]

    @property
    def fingerprint(self) -> str:
        """As every source's, but of what the tensors hold now: their owner may change them."""
        return self.sample_fingerprint()

    def shares_memory_with(self, tensors: Mapping[str, torch.Tensor]) -> bool:
        """True if any tensor lies in the same storage as one of ``tensors``."""
        mine = {t.untyped_storage().data_ptr() for t in self._tensors.values() if t.numel()}
        return any(t.untyped_storage().data_ptr() in mine for t in tensors.values() if t.numel())


def _unusable(tensor: torch.Tensor) -> str | None:
    """What keeps a tensor's elements from being read in place, if anything does."""
    if tensor.is_meta:
        return "meta"
    if tensor.is_quantized:
        return "quantised"
    if tensor.is_nested:
        return "nested"
    return None if tensor.layout == torch.strided else str(tensor.layout).removeprefix("torch.")


def _ties(places: Mapping[str, tuple[Any, ...]]) -> dict[str, str]:
    first: dict[tuple[Any, ...], str] = {}
    ties = {}
    for name, place in places.items():
        if not place[2].numel():
            continue
        owner = first.setdefault(place, name)
        if owner != name:
            ties[name] = owner
    return ties
