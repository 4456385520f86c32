"""Evaluate a form into the tensors of a module."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping

from weightops.algebra.linear_form import LinearForm, describe, tied_names
from weightops.algebra.names import mismatch
from weightops.checkpoints.formats.memory import MemorySource
from weightops.checkpoints.linearized import check_taken_by
from weightops.engine.evaluate import OnNonfinite, allocate, materialize
from weightops.errors import CheckpointError
from weightops.support.lazy import nn, torch
from weightops.support.text import first_few

log = logging.getLogger("weightops")


def load_into(
    form: LinearForm,
    module: nn.Module,
    *,
    strict: bool | None = True,
    on_nonfinite: OnNonfinite = "ignore",
) -> None:
    """Evaluate a form into the tensors of a module.

    Args:
        form: the form.
        module: the module to fill.
        strict: what to do about names that only one of them has: True refuses them, False skips
            them with a warning, None skips them.
        on_nonfinite: what to do about NaN and Inf: "ignore", "warn" or "error".

    Raises:
        MismatchError: if shapes differ, or names differ and ``strict=True``.
        CheckpointError: if the form reads the module's own tensors, which change meanwhile; or if
            the weights are a linearised model's, and the module isn't.
    """
    check_taken_by(module, form)
    targets: dict[str, torch.Tensor] = module.state_dict(keep_vars=True)
    shared = {name: tensor for name, tensor in targets.items() if name in form.specs}
    _check_names_and_shapes(form, module, targets, strict)
    if any(
        isinstance(source, MemorySource) and source.shares_memory_with(targets)
        for source in form.sources
    ):
        raise CheckpointError(
            f"{type(module).__name__}'s own tensors take part in the weights that are to fill it, "
            "and would change under the computation",
            hint="copy the module first (copy.deepcopy)",
        )
    materialize(form, shared, on_nonfinite=on_nonfinite)


def untie(module: nn.Module, form: LinearForm) -> None:
    """Give the tied names of a module tensors of their own where a form has different ones.

    transformers does the same with a warning, whatever the configuration says.
    """
    names: dict[int, list[str]] = defaultdict(list)
    for name, tensor in module.state_dict(keep_vars=True).items():
        if name in form.specs:
            names[id(tensor)].append(name)
    tied = tied_names(form)
    for owner, *aliases in names.values():
        for alias in aliases:
            pair = form.part([owner, alias])
            if tied.get(alias, alias) == tied.get(owner, owner):
                continue
            values = allocate(pair)
            materialize(pair, values)
            if not torch.equal(values[owner], values[alias]):
                log.warning("%s and %s are tied in the model, and differ here", owner, alias)
                place, _, leaf = alias.rpartition(".")
                own = nn.Parameter(torch.empty_like(module.state_dict()[alias]))
                setattr(module.get_submodule(place), leaf, own)


def _check_names_and_shapes(
    form: LinearForm, module: nn.Module, targets: Mapping[str, torch.Tensor], strict: bool | None
) -> None:
    filled = {id(tensor) for name, tensor in targets.items() if name in form.specs}
    # Of tied names, one in the form is enough.
    missing = [name for name, tensor in targets.items() if id(tensor) not in filled]
    extra = [name for name in form.specs if name not in targets]
    shapes = [
        f"{name} {form.specs[name].shape} / {tuple(tensor.shape)}"
        for name, tensor in targets.items()
        if name in form.specs and form.specs[name].shape != tuple(tensor.shape)
    ]
    if shapes or (strict and (missing or extra)):
        remedy = "load into the architecture that the weights are of"
        raise mismatch(
            f"{describe(form)} and {type(module).__name__}",
            {
                "only in the checkpoint": extra,
                "only in the module": missing,
                "of other shape": shapes,
            },
            remedy if shapes else f"{remedy}, or with strict=False",
        )
    if strict is False and (missing or extra):
        log.warning(
            "skipped, as only one of module and checkpoint has them: %s", first_few(missing + extra)
        )
