"""One checkpoint in the names of another: wrappers' prefixes, transformers' and open_clip's names, image encoders alone, deltas."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace

import torch

from weightops.checkpoints.checkpoint import Architecture, Checkpoint, CheckpointLike, open_any, open_checkpoint
from weightops.checkpoints.clip_names import Recipe, is_clip, outside_image_tower, recipes, unwrapped
from weightops.checkpoints.open_clip_folder import OpenClipArchitecture
from weightops.checkpoints.timm_folder import TimmArchitecture
from weightops.checkpoints.transformers_folder import TransformersArchitecture
from weightops.errors import CheckpointError, MismatchError
from weightops.expression import Factor, LinearForm, Source, Spec, ties
from weightops.keys import Rules, escape, some

log = logging.getLogger("weightops")

_DROPPED = ("position_ids", "attn_mask", "input_resolution", "context_length", "vocab_size", "masked_bias", "inv_freq")
"""Buffers that tell a model's sizes, which only one of two libraries keeps, or one version of one."""


class Renamed(Source):
    """A source under other names, some of its tensors transposed, stacked or divided.

    Args:
        source: what it is made from.
        made: new name -> how it is made.
        specs: of the new names.
    """

    def __init__(self, source: Source, made: Mapping[str, Recipe], specs: Mapping[str, Spec]) -> None:
        self.source, self.ref, self.space, self.passed_over = source, source.ref, source.space, source.passed_over
        self._made = {name: r for name, r in made.items() if any(part in source.specs for part in r.names)}
        self.specs = {name: Spec(specs[name].shape, self._dtype(name)) for name in self._made}
        self.computed = source.computed or any(r.kind != "copy" for r in self._made.values())
        first: dict[str, str] = {}
        copies = {name: r.names[0] for name, r in self._made.items() if r.kind == "copy"}
        owners = {name: first.setdefault(source.ties.get(copied, copied), name) for name, copied in copies.items()}
        self.ties = {name: owner for name, owner in owners.items() if owner != name}
        self.identity = None if source.identity is None else ("renamed", source.identity, tuple(self._made.items()))

    def _dtype(self, name: str) -> torch.dtype:
        return next(self.source.specs[part].dtype for part in self._made[name].names if part in self.source.specs)

    def read(self, name: str) -> torch.Tensor:
        kind, names, index = self._made[name]
        if kind == "stack":
            height, *rest = self.specs[name].shape
            zero = torch.zeros(1, dtype=self.specs[name].dtype).expand(height // len(names), *rest)
            return torch.cat([self.source.read(part) if part in self.source.specs else zero for part in names])
        tensor = self.source.read(names[0])
        if kind == "part":
            return tensor.chunk(3)[index]
        return tensor.T if kind == "transpose" else tensor

    def describe(self) -> dict[str, object]:
        """As its source: names aren't what it was made from."""
        return self.source.describe()


def _shape(recipe: Recipe, specs: Mapping[str, Spec]) -> tuple[int, ...]:
    shape = next(specs[part].shape for part in recipe.names if part in specs)
    if recipe.kind == "transpose":
        return shape[::-1]
    if recipe.kind == "stack":
        return (shape[0] * len(recipe.names), *shape[1:]) if shape else shape
    return (shape[0] // 3, *shape[1:]) if recipe.kind == "part" and shape else shape


def fitted(form: LinearForm, base: LinearForm) -> LinearForm:
    """A form in the names of a base, where it can be brought to them: else as it is.

    Weights are renamed if every name of theirs has its place, or what has none only tells a size; a delta likewise. Of tied
    names, it has those that the base has.
    """
    if not set(form.specs) <= set(base.specs):
        made = recipes(form.specs, base.specs, partly=form.space == "delta")
        used = {part for recipe in made.values() for part in recipe.names}
        tied = ties(form)
        lost = [
            name
            for name, spec in form.specs.items()
            if name not in used and tied.get(name) not in used and not _tells_a_size(name, spec)
        ]
        if made and not lost:
            form = _made(form, made)
    aliases = {
        name: other
        for pair in ties(base).items()
        for name, other in (pair, pair[::-1])
        if other in form.specs and not any(name in source.specs for source in form.sources)
    }
    if not aliases:
        return form
    return _made(form, {name: Recipe("copy", (aliases.get(name, name),)) for name in (*form.specs, *aliases)})


def _made(form: LinearForm, made: Mapping[str, Recipe]) -> LinearForm:
    """The form of what is made of a form's tensors."""
    specs = {
        name: Spec(_shape(r, form.specs), next(form.specs[part].dtype for part in r.names if part in form.specs))
        for name, r in made.items()
    }
    sources = {source: Renamed(source, made, specs) for source in form.sources}
    terms = {
        Factor(sources[f.source], tuple(_renamed_rules(rules, made, f.source) for rules in f.rules)): coefficient
        for f, coefficient in form.terms.items()
    }
    return replace(form, specs=specs, terms=terms, base=sources[form.base] if form.base else None)


def _renamed_rules(rules: Rules, made: Mapping[str, Recipe], source: Source) -> Rules:
    """Rules on old names as rules on new ones.

    Raises:
        MismatchError: if they differ within what is one tensor now.
    """
    items = []
    for name, recipe in made.items():
        values = {rules(part) for part in recipe.names if part in source.specs}
        if len(values) > 1:
            raise MismatchError(
                f"{some(recipe.names)} have different coefficients, and are one tensor {name} in the other"
            )
        items += [(escape(name), value) for value in values]
    return Rules(tuple(items))


def alike(checkpoint: Checkpoint, base: Checkpoint) -> Checkpoint:
    """Weights in the names of a base; an image encoder alone is completed by the rest of the base's CLIP model.

    What can't be brought to the base's names is given back as it is, for the comparison to refuse.
    """
    form = fitted(checkpoint.form, base.form)
    missing = [name for name in base.specs if name not in form.specs]
    extra = [name for name in form.specs if name not in base.specs]
    short = {original: name for name, original in unwrapped(base.specs).items()}
    outside = outside_image_tower(short[name] for name in missing if not _tells_a_size(name, base.specs[name]))
    sizes = [name for name in missing if _tells_a_size(name, base.specs[name])]
    if missing and not extra and (len(sizes) == len(missing) or (outside and is_clip(short.values()))):
        if len(sizes) < len(missing):
            log.info("%s is an image encoder: %s come from %s", checkpoint.ref, some(missing), base.ref)
        delta, _ = LinearForm.difference(form, base.form, strict=False)
        form = base.form.plus(delta)
    return checkpoint if form is checkpoint.form else checkpoint.as_of(form, checkpoint.architecture)


def _tells_a_size(name: str, spec: Spec) -> bool:
    leaf = name.rpartition(".")[2]
    return leaf in _DROPPED or (leaf == "bias" and len(spec.shape) == 4 and spec.shape[:2] == (1, 1))  # GPT-2's mask


def open_like(source: CheckpointLike, base: Checkpoint) -> Checkpoint:
    """Open weights to be compared with a base: in its names, and with what changes only parts of it applied to it.

    Raises:
        CheckpointError: if it can't be opened.
        MismatchError: if it is a delta whose tensors the base hasn't.
    """
    opened = open_any(source)
    if opened.form.space == "weights":
        return alike(opened, base)
    made_on = getattr(opened.form.sources[0], "made_from", {}).get("base")
    if isinstance(made_on, dict) and made_on.get("fingerprint") != base.fingerprint:
        log.warning(
            "%s was made from %s (%s), and is taken from %s",
            opened.ref,
            made_on.get("ref"),
            made_on.get("fingerprint"),
            base.ref,
        )
    form = base.form.plus(fitted(opened.form, base.form)) if opened.form.specs else base.form
    replaced = getattr(opened.form.sources[0], "replaced", None)
    if replaced is not None:
        whole, left_out = LinearForm.difference(fitted(LinearForm.of(replaced), base.form), base.form, strict=False)
        form = form.plus(whole)
        extra = [name for name in left_out if name not in base.specs]
        if extra:
            raise MismatchError(f"{opened.ref} brings {some(extra)}, which {base.ref} doesn't have")
    return Checkpoint(form, base.architecture)


def for_open_clip(checkpoint: Checkpoint) -> Checkpoint:
    """A CLIP model of transformers as open_clip has it; any other checkpoint as it is."""
    architecture = checkpoint.architecture
    converted = architecture.open_clip() if isinstance(architecture, TransformersArchitecture) else None
    return _built_as(converted, checkpoint) if converted else checkpoint


def in_format(checkpoint: Checkpoint, name: str) -> Checkpoint:
    """A checkpoint as "open_clip", "transformers" or "timm" has it: the folder that it is saved to loads in that library.

    CLIP models go from open_clip to transformers and back; "safetensors" leaves all but the weights away.

    Raises:
        CheckpointError: if that library hasn't such a model, or it isn't known of what model the weights are.
    """
    architecture = checkpoint.architecture
    if name == "safetensors":
        return checkpoint.as_of(checkpoint.form, None)
    if name == _library(architecture):
        return checkpoint
    if name == "open_clip" and isinstance(architecture, TransformersArchitecture):
        converted = for_open_clip(checkpoint)
        if converted is not checkpoint:
            return converted
    if name == "transformers" and isinstance(architecture, OpenClipArchitecture):
        return _built_as(TransformersArchitecture.of_open_clip(architecture), checkpoint)
    known = _library(architecture)
    what = f"a model of {known}" if known else "of no model that is known"
    raise CheckpointError(f"{checkpoint.ref} is {what}, and can't be written for {name}")


def _library(architecture: Architecture | None) -> str | None:
    kinds = {"open_clip": OpenClipArchitecture, "transformers": TransformersArchitecture, "timm": TimmArchitecture}
    return next((name for name, kind in kinds.items() if isinstance(architecture, kind)), None)


def _built_as(architecture: Architecture, checkpoint: Checkpoint) -> Checkpoint:
    """A checkpoint in the names of the model that an architecture builds."""
    return checkpoint.as_of(fitted(checkpoint.form, open_checkpoint(architecture.build()).form), architecture)
