"""TODO."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace

import torch

from weightops.algebra.linear_form import Factor, LinearForm, tied_names
from weightops.algebra.names import NameRules, escape
from weightops.algebra.source import Source, Spec
from weightops.checkpoints.clip_names import TensorMapping, mappings
from weightops.errors import MismatchError
from weightops.support.text import first_few

log = logging.getLogger("weightops")

_DROPPED = (
    "position_ids",
    "attn_mask",
    "input_resolution",
    "context_length",
    "vocab_size",
    "masked_bias",
    "inv_freq",
)
"""Buffers that tell a model's sizes, which only one of two libraries keeps, or one version of one."""


class Renamed(Source):
    """A source under other names, some of its tensors transposed, stacked or divided.

    Args:
        source: what it is made from.
        made: new name -> how it is made.
        specs: of the new names.
    """

    def __init__(
        self, source: Source, made: Mapping[str, TensorMapping], specs: Mapping[str, Spec]
    ) -> None:
        self.source, self.ref, self.space, self.skipped = (
            source,
            source.ref,
            source.space,
            source.skipped,
        )
        self._made = {
            name: r for name, r in made.items() if any(part in source.specs for part in r.names)
        }
        self.specs = {name: Spec(specs[name].shape, self._dtype(name)) for name in self._made}
        self.computed = source.computed or any(r.kind != "copy" for r in self._made.values())
        first: dict[str, str] = {}
        copies = {name: r.names[0] for name, r in self._made.items() if r.kind == "copy"}
        owners = {
            name: first.setdefault(source.ties.get(copied, copied), name)
            for name, copied in copies.items()
        }
        self.ties = {name: owner for name, owner in owners.items() if owner != name}
        self.identity = (
            None
            if source.identity is None
            else ("renamed", source.identity, tuple(self._made.items()))
        )

    def _dtype(self, name: str) -> torch.dtype:
        return next(
            self.source.specs[part].dtype
            for part in self._made[name].names
            if part in self.source.specs
        )

    def read(self, name: str) -> torch.Tensor:
        kind, names, index = self._made[name]
        if kind == "stack":
            height, *rest = self.specs[name].shape
            zero = torch.zeros(1, dtype=self.specs[name].dtype).expand(height // len(names), *rest)
            return torch.cat(
                [self.source.read(part) if part in self.source.specs else zero for part in names]
            )
        tensor = self.source.read(names[0])
        if kind == "part":
            return tensor.chunk(3)[index]
        return tensor.T if kind == "transpose" else tensor

    def describe(self) -> dict[str, object]:
        """As its source: names aren't what it was made from."""
        return self.source.describe()


def _shape(recipe: TensorMapping, specs: Mapping[str, Spec]) -> tuple[int, ...]:
    shape = next(specs[part].shape for part in recipe.names if part in specs)
    if recipe.kind == "transpose":
        return shape[::-1]
    if recipe.kind == "stack":
        return (shape[0] * len(recipe.names), *shape[1:]) if shape else shape
    return (shape[0] // 3, *shape[1:]) if recipe.kind == "part" and shape else shape


def rename_to_match(form: LinearForm, base: LinearForm) -> LinearForm:
    """A form in the names of a base, where it can be brought to them: else as it is.

    Weights are renamed if every name of theirs has its place, or what has none only tells a size; a delta likewise. Of tied
    names, it has those that the base has.
    """
    if not set(form.specs) <= set(base.specs):
        made = mappings(form.specs, base.specs, partly=form.space == "delta")
        used = {part for recipe in made.values() for part in recipe.names}
        tied = tied_names(form)
        lost = [
            name
            for name, spec in form.specs.items()
            if name not in used and tied.get(name) not in used and not tells_a_size(name, spec)
        ]
        if made and not lost:
            form = _made(form, made)
    aliases = {
        name: other
        for pair in tied_names(base).items()
        for name, other in (pair, pair[::-1])
        if other in form.specs and not any(name in source.specs for source in form.sources)
    }
    if not aliases:
        return form
    return _made(
        form,
        {
            name: TensorMapping("copy", (aliases.get(name, name),))
            for name in (*form.specs, *aliases)
        },
    )


def _made(form: LinearForm, made: Mapping[str, TensorMapping]) -> LinearForm:
    """The form of what is made of a form's tensors."""
    specs = {
        name: Spec(
            _shape(r, form.specs),
            next(form.specs[part].dtype for part in r.names if part in form.specs),
        )
        for name, r in made.items()
    }
    sources = {source: Renamed(source, made, specs) for source in form.sources}
    terms = {
        Factor(
            sources[f.source], tuple(_renamed_rules(rules, made, f.source) for rules in f.rules)
        ): coefficient
        for f, coefficient in form.terms.items()
    }
    return replace(form, specs=specs, terms=terms, base=sources[form.base] if form.base else None)


def _renamed_rules(
    rules: NameRules, made: Mapping[str, TensorMapping], source: Source
) -> NameRules:
    """Rules on old names as rules on new ones.

    Raises:
        MismatchError: if they differ within what is one tensor now.
    """
    items = []
    for name, recipe in made.items():
        values = {rules(part) for part in recipe.names if part in source.specs}
        if len(values) > 1:
            raise MismatchError(
                f"{first_few(recipe.names)} have different coefficients, and are one tensor {name} in the other"
            )
        items += [(escape(name), value) for value in values]
    return NameRules(tuple(items))


def tells_a_size(name: str, spec: Spec) -> bool:
    leaf = name.rpartition(".")[2]
    return leaf in _DROPPED or (
        leaf == "bias" and len(spec.shape) == 4 and spec.shape[:2] == (1, 1)
    )  # GPT-2's mask
