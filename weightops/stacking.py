"""Layers of several models put on top of each other."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence

import torch

from weightops.checkpoints.checkpoint import Checkpoint
from weightops.checkpoints.transformers_folder import TransformersArchitecture
from weightops.engine.run import plan, reader
from weightops.errors import RecipeError
from weightops.expression import LinearForm, Source, provenance
from weightops.kernels import Scratch
from weightops.keys import depths, some

_LAYER = re.compile(r"(.*?(?:^|\.))(\d+)(\..*|$)")


class Layers(Source):
    """A source's layers ``start`` to ``stop`` renumbered from ``first``, and what comes before or after all layers if it is wanted.

    Args:
        source: the model.
        start: the first layer.
        stop: behind the last.
        first: the new number of the first.
        before: keep embeddings and what else isn't in a layer and comes before them.
        after: keep heads and what else comes after them.

    Raises:
        RecipeError: if the model lacks some of the layers.
    """

    def __init__(self, source: Source, start: int, stop: int, *, first: int, before: bool, after: bool) -> None:
        self._names: dict[str, str] = {}
        found = set()
        for name, depth in depths(source.specs).items():
            layer = _LAYER.fullmatch(name)
            if layer is None:
                if (before and depth == 0) or (after and depth == 1):
                    self._names[name] = name
            elif start <= int(layer[2]) < stop:
                found.add(int(layer[2]))
                self._names[f"{layer[1]}{int(layer[2]) - start + first}{layer[3]}"] = name
        missing = [str(i) for i in range(start, stop) if i not in found]
        if missing or stop <= start:
            raise RecipeError(f"{source.ref} has no layer {some(missing) or f'from {start} to {stop}'}")
        self._source, self.ref = source, f"{source.ref}[{start}:{stop}]"
        self.specs = {new: source.specs[old] for new, old in self._names.items()}
        new = {old: name for name, old in self._names.items()}
        self.ties = {new[a]: new[b] for a, b in source.ties.items() if a in new and b in new}
        self.computed = source.computed
        self.identity = None if source.identity is None else ("layers", source.identity, tuple(self._names.items()))

    def read(self, name: str) -> torch.Tensor:
        return self._source.read(self._names[name])

    def open(self, name: str) -> Callable[[int, int], torch.Tensor]:
        return self._source.open(self._names[name])

    def describe(self) -> dict[str, object]:
        """The source, and which of its layers."""
        return {**self._source.describe(), "ref": self.ref}


class Stack(Source):
    """Weights of which each part comes from another form."""

    computed = True

    def __init__(self, parts: Sequence[LinearForm]) -> None:
        self._owner: Mapping[str, LinearForm] = {name: form for form in parts for name in form.specs}
        self._parts = parts
        self.ref = " / ".join(source.ref for form in parts for source in form.sources)
        self.specs, self.ties = {name: form.specs[name] for name, form in self._owner.items()}, {}

    def read(self, name: str) -> torch.Tensor:
        return self.open(name)(0, self.specs[name].numel).reshape(self.specs[name].shape)

    def open(self, name: str) -> Callable[[int, int], torch.Tensor]:
        read = reader(plan(self._owner[name], [name])[0], Scratch())

        def part(start: int, stop: int) -> torch.Tensor:
            out = torch.empty(stop - start, dtype=self.specs[name].dtype)
            read(start, stop, out)
            return out

        return part

    @property
    def leaves(self) -> list[Source]:
        return list(dict.fromkeys(leaf for form in self._parts for source in form.sources for leaf in source.leaves))

    def describe(self) -> dict[str, object]:
        """Its parts, from the first layer to the last."""
        return {"stack": [provenance(form) for form in self._parts]}


def stacked(parts: Sequence[Checkpoint], layers: int) -> Checkpoint:
    """One model of parts with different layers, whose configuration says how many there are.

    Raises:
        RecipeError: if the architecture is one whose configuration weightops can't change.
    """
    architecture = copy.copy(parts[0].architecture)
    if isinstance(architecture, TransformersArchitecture):
        architecture.layers = layers
    elif architecture is not None:
        raise RecipeError(f"the number of layers of {parts[0].ref} can't be changed: it isn't a transformers folder")
    return Checkpoint(LinearForm.of(Stack([part.form for part in parts])), architecture)
