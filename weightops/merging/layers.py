"""Layers of several models put on top of each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from weightops.algebra.dtypes import accumulator, is_editable
from weightops.algebra.linear_form import LinearForm, provenance, tied_names
from weightops.algebra.names import depths, layer_of
from weightops.algebra.scratch import Scratch
from weightops.algebra.source import ComputedSource, Source
from weightops.checkpoints.checkpoint import Checkpoint
from weightops.engine.evaluate import buffered, reader
from weightops.engine.plan import plan
from weightops.errors import CheckpointError, RecipeError
from weightops.support.text import first_few


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

    def __init__(
        self, source: Source, start: int, stop: int, *, first: int, before: bool, after: bool
    ) -> None:
        self._names: dict[str, str] = {}
        found = set()
        for name, depth in depths(source.specs).items():
            layer = layer_of(name)
            if layer is None:
                if (before and depth == 0) or (after and depth == 1):
                    self._names[name] = name
            elif start <= layer.number < stop:
                found.add(layer.number)
                self._names[f"{layer.before}{layer.number - start + first}{layer.after}"] = name
        missing = [str(i) for i in range(start, stop) if i not in found]
        if missing or stop <= start:
            raise RecipeError(
                f"{source.ref} has no layer {first_few(missing) or f'from {start} to {stop}'}"
            )
        self._source, self.ref = source, f"{source.ref}[{start}:{stop}]"
        self.specs = {new: source.specs[old] for new, old in self._names.items()}
        new = {old: name for name, old in self._names.items()}
        self.ties = {new[a]: new[b] for a, b in source.ties.items() if a in new and b in new}
        self.computed = source.computed
        self.identity = (
            None
            if source.identity is None
            else ("layers", source.identity, tuple(self._names.items()))
        )

    def read(self, name: str) -> torch.Tensor:
        return self._source.read(self._names[name])

    def open(self, name: str, scratch: Scratch) -> Callable[[int, int], torch.Tensor]:
        return self._source.open(self._names[name], scratch)

    def describe(self) -> dict[str, object]:
        """The source, and which of its layers."""
        return {**self._source.describe(), "ref": self.ref}


class Stack(ComputedSource):
    """Weights of which each part comes from another form."""

    def __init__(self, parts: Sequence[LinearForm]) -> None:
        self._owner: Mapping[str, LinearForm] = {
            name: form for form in parts for name in form.specs
        }
        self._parts = parts
        self.ref = " / ".join(source.ref for form in parts for source in form.sources)
        self.specs = {name: form.specs[name] for name, form in self._owner.items()}
        self.ties = {
            a: b
            for form in parts
            for a, b in tied_names(form).items()
            if self._owner[a] is self._owner[b] is form
        }

    def open(self, name: str, scratch: Scratch) -> Callable[[int, int], torch.Tensor]:
        [step] = plan(self._owner[name], [name])
        dtype = self.specs[name].dtype
        return buffered(
            reader([step], scratch), accumulator(dtype) if is_editable(dtype) else dtype, scratch
        )

    @property
    def leaves(self) -> list[Source]:
        return list(dict.fromkeys(leaf for form in self._parts for leaf in form.leaves))

    def describe(self) -> dict[str, object]:
        """Its parts, from the first layer to the last."""
        return {"stack": [provenance(form) for form in self._parts]}


def stacked(parts: Sequence[Checkpoint], spans: Sequence[tuple[int, int]]) -> Checkpoint:
    """One model of parts with different layers, whose configuration says how many there are, and what it says of each layer.

    Args:
        parts: from the first layers to the last.
        spans: where each part's layers begin and end in the model that it is of.

    Raises:
        RecipeError: if the architecture is one whose configuration weightops can't change.
    """
    architecture = parts[0].architecture
    if architecture is not None:
        try:
            architecture = architecture.with_layers(spans, [part.architecture for part in parts])
        except CheckpointError as error:
            raise RecipeError(error.fact, hint=error.hint) from error
    return Checkpoint(LinearForm.of(Stack([part.form for part in parts])), architecture)
