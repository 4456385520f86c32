"""Tied weights: names under which a model has one tensor, such as an embedding and a head."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Set
from functools import cache
from typing import Any

from weightops.algebra.linear_form import LinearForm, tied_names
from weightops.algebra.names import layer_of
from weightops.algebra.same_bits import copy_of
from weightops.checkpoints.checkpoint import Checkpoint
from weightops.checkpoints.conversion import TensorMapping
from weightops.checkpoints.libraries.base import Architecture
from weightops.checkpoints.renamed import renamed
from weightops.checkpoints.skeleton import shared_names

log = logging.getLogger("weightops")

_TIED = "tie_word_embeddings"


def with_tied_names(base: Checkpoint, names: Iterable[str]) -> Checkpoint:
    """Return a checkpoint with names that its file leaves out since the model ties them.

    Args:
        base: the checkpoint.
        names: the names that are wanted; only those that the model ties to one that the
            checkpoint has are added.
    """
    warn_of_ends_that_differ(base)
    wanted = [name for name in names if name not in base.specs]
    ties = _ties_of_model(base) if wanted else {}
    added = {name: ties[name] for name in wanted if name in ties}
    if not added:
        return base
    return base.with_form(with_copies(base.form, added), base.architecture)


def warn_of_ends_that_differ(*checkpoints: Checkpoint) -> None:
    """Warn of weights that hold two tensors where their model has one, once for each file."""
    for checkpoint in checkpoints:
        for first, second in _differing_ends(checkpoint):
            _say_that_ends_differ(checkpoint.ref, first, second)


@cache
def _say_that_ends_differ(ref: str, first: str, second: str) -> None:
    log.warning(
        "%s and %s are tied in the model, and differ in %s: each is edited apart",
        first,
        second,
        ref,
    )


def _differing_ends(checkpoint: Checkpoint) -> list[tuple[str, str]]:
    """Return pairs of names that a model ties and a file has different tensors for."""
    architecture, form = checkpoint.architecture, checkpoint.form
    if architecture is None or architecture.library != "transformers" or len(form.sources) != 1:
        return []
    if architecture.config.get(_TIED) is False:
        return []
    [source], tied = form.sources, tied_names(form)
    shapes: dict[object, list[str]] = {}
    for name, spec in source.specs.items():
        if len(spec.shape) == 2 and name not in tied and not layer_of(name):
            shapes.setdefault(spec, []).append(name)
    several = (names for names in shapes.values() if len(names) > 1)
    apart = {n for names in several for n in names if copy_of(source, n, names) is None}
    if not apart or checkpoint.skeleton is None:
        return []
    pairs = []
    for group in shared_names(checkpoint.skeleton):
        held = dict.fromkeys(n for name in group for n in checkpoint.memory.files_of(name))
        first, *others = held if apart & held.keys() else [""]
        pairs += [(first, other) for other in others if other in apart or first in apart]
    return pairs


def with_copies(form: LinearForm, copies: Mapping[str, str]) -> LinearForm:
    """Return a form in which more names are tied to names that it has.

    Args:
        form: the form.
        copies: name -> the name whose tensor it shares.
    """
    mapped = {name: TensorMapping("copy", (name,)) for name in form.specs}
    mapped |= {name: TensorMapping("copy", (owner,)) for name, owner in copies.items()}
    return renamed(form, mapped)


def ends_left_out(base: Checkpoint) -> list[str]:
    """Return the names that a checkpoint's file leaves out since the model ties them."""
    return list(_ties_of_model(base))


def _ties_of_model(base: Checkpoint) -> dict[str, str]:
    """Return name that a checkpoint lacks -> the name that it has for the tied tensor."""
    if base.architecture is None or base.skeleton is None:
        return {}
    ties: dict[str, str] = {}
    for group in shared_names(base.skeleton):
        held = {name: base.memory.files_of(name) for name in group}
        owner = next((files[0] for files in held.values() if files), None)
        ties |= {name: owner for name, files in held.items() if owner and not files}
    return ties


def ends_in_memory(
    form: LinearForm, base: Checkpoint | None, changed: Set[str]
) -> dict[str, list[str]]:
    """Return the parameters of modules whose weight the model uses twice and a delta changes.

    Args:
        form: the delta.
        base: the checkpoint that it was taken from, if it is known.
        changed: the names of the form that aren't zero.

    Returns:
        The name in the checkpoint -> the names in memory.
    """
    if base is None or base.skeleton is None:
        return {}
    tied, groups = tied_names(form), shared_names(base.skeleton)
    stored: dict[str, str] = {}
    for name, _ in base.skeleton.named_parameters(remove_duplicate=False):
        group = next((group for group in groups if name in group), [name])
        held = [file for other in (name, *group) for file in base.memory.files_of(other)]
        if held:
            stored[name] = tied.get(held[0], held[0])
    modules = {
        name.rpartition(".")[0]: None
        for group in groups
        if any(
            stored.get(name) in changed and len(form.specs[stored[name]].shape) == 2
            for name in group
        )
        for name in group
    }
    ends: dict[str, list[str]] = {}
    for name, file in stored.items():
        if name.rpartition(".")[0] in modules:
            ends.setdefault(file, []).append(name)
    return ends


def names_apart(form: LinearForm, base: LinearForm) -> list[str]:
    """Return the names that share a tensor in a base and no longer do in a form."""
    tied = tied_names(form)
    return [name for name in tied_names(base) if name in form.specs and name not in tied]


def architecture_of_ends(form: LinearForm, base: Checkpoint) -> Architecture | None:
    """Return a base's architecture, untied if a form has apart what the base has tied."""
    architecture = base.architecture
    known = architecture is not None and architecture.library == "transformers"
    if architecture is None or not known or not names_apart(form, base.form):
        return architecture
    return architecture.changed(_untied(architecture.config))


def _untied(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the changes of a configuration of transformers that untie the embeddings."""
    nested = {
        key: {**value, _TIED: False}
        for key, value in config.items()
        if isinstance(value, Mapping) and value.get(_TIED)
    }
    return {**nested, _TIED: False}
