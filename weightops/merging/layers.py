"""Layers of several models put on top of each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice

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


class Layers(Source):
    """Some layers of a source under new numbers, with the tensors before or after all layers.

    Args:
        source: the model.
        start: the first layer.
        stop: the layer after the last.
        first: the new number of the first layer.
        before: keep embeddings, and other tensors that come before the layers.
        after: keep heads, and other tensors that come after the layers.

    Raises:
        RecipeError: if the model lacks some of the layers.
    """

    def __init__(
        self, source: Source, start: int, stop: int, *, first: int, before: bool, after: bool
    ) -> None:
        self._names: dict[str, str] = {}
        present = set()
        for name, depth in depths(source.specs).items():
            layer = layer_of(name)
            if layer is None:
                if (before and depth == 0) or (after and depth == 1):
                    self._names[name] = name
            elif start <= layer.number < stop:
                present.add(layer.number)
                self._names[f"{layer.before}{layer.number - start + first}{layer.after}"] = name
        # A recipe may say any numbers, so no more than a few are listed.
        missing = list(islice((str(n) for n in range(start, stop) if n not in present), 3))
        if missing or stop <= start:
            raise RecipeError(
                f"{source.ref} has no layer {', '.join(missing) or f'from {start} to {stop}'}"
            )
        self._source, self.ref = source, f"{source.ref}[{start}:{stop}]"
        self.specs = {new: source.specs[old] for new, old in self._names.items()}
        new = {old: name for name, old in self._names.items()}
        self.ties = {new[a]: new[b] for a, b in source.ties.items() if a in new and b in new}
        self.computed, self.files = source.computed, source.files
        if source.identity is not None:
            self.identity = ("layers", source.identity, tuple(self._names.items()))

    def read(self, name: str) -> torch.Tensor:
        return self._source.read(self._names[name])

    def open(self, name: str, scratch: Scratch) -> Callable[[int, int], torch.Tensor]:
        return self._source.open(self._names[name], scratch)

    def describe(self) -> dict[str, object]:
        """Return the provenance of the source, with the layers in its ref."""
        return {**self._source.describe(), "ref": self.ref}


class Stack(ComputedSource):
    """The tensors of several forms that have no name in common, as one source."""

    def __init__(self, forms: Sequence[LinearForm]) -> None:
        self._owner = {name: form for form in forms for name in form.specs}
        self._forms = forms
        self.ref = " / ".join(source.ref for form in forms for source in form.sources)
        self.specs = {name: form.specs[name] for name, form in self._owner.items()}
        self.ties = {
            alias: name
            for form in forms
            for alias, name in tied_names(form).items()
            if self._owner[alias] is self._owner[name] is form
        }

    def open(self, name: str, scratch: Scratch) -> Callable[[int, int], torch.Tensor]:
        steps = plan(self._owner[name], [name])
        dtype = self.specs[name].dtype
        working = accumulator(dtype) if is_editable(dtype) else dtype
        return buffered(reader(steps, scratch), working, scratch)

    @property
    def leaves(self) -> list[Source]:
        return list(dict.fromkeys(leaf for form in self._forms for leaf in form.leaves))

    def describe(self) -> dict[str, object]:
        """Return the provenance of the forms, from the first layers to the last."""
        return {"stack": [provenance(form) for form in self._forms]}


def stack_layers(parts: Sequence[Checkpoint], spans: Sequence[tuple[int, int]]) -> Checkpoint:
    """Stack checkpoints with different layers to one model, with a configuration of all layers.

    Args:
        parts: the checkpoints, from the first layers to the last.
        spans: for each part, its first layer and the one after its last, as the model numbers them
            that the part is taken from.

    Raises:
        RecipeError: if weightops can't change the number of layers of the architecture.
    """
    architecture = parts[0].architecture
    if architecture is not None:
        try:
            architecture = architecture.with_layers(spans, [part.architecture for part in parts])
        except CheckpointError as error:
            raise RecipeError(error.fact, hint=error.hint) from error
    return Checkpoint(LinearForm.of(Stack([part.form for part in parts])), architecture)
