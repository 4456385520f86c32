"""Layers of several models put on top of each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import islice

from weightops.algebra.dtypes import accumulator, is_editable
from weightops.algebra.linear_form import Factor, LinearForm, tied_names
from weightops.algebra.names import NameRules, depths, escape, layer_of
from weightops.algebra.provenance import provenance
from weightops.algebra.scratch import Scratch
from weightops.algebra.source import ComputedSource, Source
from weightops.checkpoints.checkpoint import Checkpoint
from weightops.checkpoints.ties import architecture_of_ends, names_apart
from weightops.engine.evaluate import buffered, reader
from weightops.engine.plan import plan
from weightops.errors import CheckpointError, RecipeError
from weightops.merging.towers import depth_keys, stacked_towers
from weightops.support.lazy import torch
from weightops.support.text import portable


class Layers(Source):
    """Some tensors of a source under new names.

    Args:
        source: the model.
        names: new name -> name in the source.
        ref: the name of the layers in messages.
    """

    def __init__(self, source: Source, names: Mapping[str, str], ref: str) -> None:
        self._names = {new: old for new, old in names.items() if old in source.specs}
        self._source, self.ref, self.space = source, ref, source.space
        self.files, self.metadata = source.files, source.metadata
        self.specs = {new: source.specs[old] for new, old in self._names.items()}
        new = {old: name for name, old in self._names.items()}
        self.ties = {new[a]: new[b] for a, b in source.ties.items() if a in new and b in new}
        self.computed = source.computed
        if source.identity is not None:
            self.identity = ("layers", source.identity, tuple(self._names.items()))

    def read(self, name: str) -> torch.Tensor:
        return self._source.read(self._names[name])

    def open(self, name: str, scratch: Scratch) -> Callable[[int, int], torch.Tensor]:
        return self._source.open(self._names[name], scratch)

    @property
    def leaves(self) -> list[Source]:
        return [self] if self._source.leaves == [self._source] else self._source.leaves

    def working_bytes(self, name: str) -> int:
        return self._source.working_bytes(self._names[name])

    def describe(self) -> dict[str, object]:
        """Return the provenance of the source, with the layers in its ref."""
        return {**self._source.describe(), "ref": portable(self.ref)}


def take_layers(
    model: Checkpoint,
    span: tuple[int, int],
    *,
    first: int,
    before: bool,
    after: bool,
    module: str | None = None,
) -> Checkpoint:
    """Return some layers of a model under new numbers.

    Only the towers whose layers are meant are cut; other towers go with what comes before them.

    Args:
        model: the model.
        span: the first layer, and the layer after the last.
        first: the new number of the first layer.
        before: keep embeddings, and other tensors that come before the layers.
        after: keep heads, and other tensors that come after the layers.
        module: the part of the model whose layers are meant; by default the language model.

    Raises:
        RecipeError: if the model lacks some of the layers.
    """
    start, stop = span
    towers = stacked_towers(model.specs, module)
    names: dict[str, str] = {}
    present: dict[str, set[int]] = {tower: set() for tower in towers}
    alone = _only_in_first_layer(model.specs, towers)
    for name, depth in depths(model.specs).items():
        layer = layer_of(name)
        if layer is None or layer.before not in towers or name in alone:
            if (before and (layer is not None or depth == 0)) or (
                after and layer is None and depth == 1
            ):
                names[name] = name
        elif start <= layer.number < stop:
            present[layer.before].add(layer.number)
            names[f"{layer.before}{layer.number - start + first}{layer.after}"] = name
    for tower, numbers in (present or {"": set()}).items():
        # A recipe may say any numbers, so no more than a few are listed.
        lacking = (str(number) for number in range(start, stop) if number not in numbers)
        missing = ", ".join(islice(lacking, 3))
        if missing or stop <= start:
            more = stop - start - sum(start <= number < stop for number in numbers) - 3
            depth_of = f": {tower[:-1]} has {towers[tower]}" if tower in towers else ""
            raise RecipeError(
                f"{model.ref} has no layer {missing or f'from {start} to {stop}'}"
                f"{f' and {more} more' * (more > 0)}{depth_of}"
            )
    return model.with_form(_renamed(model.form, names, f"[{start}:{stop}]"), model.architecture)


def _only_in_first_layer(names: Mapping[str, object], towers: Mapping[str, int]) -> set[str]:
    """Return the tensors that layer 0 has and no other, such as T5's table of relative positions.

    They belong to the tower, whatever its first layer is.
    """
    layers = {name: layer for name in names if (layer := layer_of(name)) is not None}
    later = {(layer.before, layer.after) for layer in layers.values() if layer.number}
    return {
        name
        for name, layer in layers.items()
        if towers.get(layer.before, 0) > 1
        and layer.number == 0
        and (layer.before, layer.after) not in later
        and "relative" in name
    }


def _renamed(form: LinearForm, names: Mapping[str, str], suffix: str) -> LinearForm:
    """Return a form of some tensors, under new names."""
    sources = {source: Layers(source, names, f"{source.ref}{suffix}") for source in form.sources}
    terms = {}
    for factor, coefficient in form.terms.items():
        rules = tuple(
            NameRules(tuple((escape(new), rule(old)) for new, old in names.items()))
            for rule in factor.rules
        )
        terms[Factor(sources[factor.source], rules)] = coefficient
    specs = {new: form.specs[old] for new, old in names.items()}
    return replace(form, specs=specs, terms=terms, base=sources[form.base] if form.base else None)


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


def stack_layers(
    parts: Sequence[Checkpoint],
    spans: Sequence[tuple[int, int]],
    models: Sequence[Checkpoint],
    module: str | None = None,
) -> Checkpoint:
    """Stack checkpoints with different layers to one model, with a configuration of all layers.

    Args:
        parts: the checkpoints, from the first layers to the last.
        spans: for each part, its first layer and the one after its last, as the model numbers them
            that the part is taken from.
        models: the models that the parts are taken from.
        module: the part of the model whose layers are meant; by default the language model.

    Raises:
        RecipeError: if weightops can't change the number of layers of the architecture.
    """
    form = LinearForm.of(Stack([part.form for part in parts]))
    architecture = parts[0].architecture
    if architecture is not None:
        if names_apart(form, models[0].form):
            architecture = architecture_of_ends(form, models[0]) or architecture
        try:
            for tower, count in stacked_towers(models[0].specs, module).items():
                section, keys = depth_keys(tower, architecture.config)
                architecture = architecture.with_layers(
                    spans,
                    [part.architecture for part in parts],
                    count=count,
                    section=section,
                    keys=keys,
                )
        except CheckpointError as error:
            raise RecipeError(error.fact, hint=error.hint) from error
    return Checkpoint(form, architecture)
