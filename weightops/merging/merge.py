"""Merge checkpoints by any method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias, overload

from weightops.algebra.linear_form import LinearForm, check_match
from weightops.algebra.names import PerTensor
from weightops.algebra.source import Source
from weightops.checkpoints.adapters.adapter import Adapter
from weightops.checkpoints.adapters.joining import JoinedAdapter, check_joinable
from weightops.checkpoints.checkpoint import Checkpoint
from weightops.checkpoints.kinds import is_module, several
from weightops.checkpoints.matching import open_matched
from weightops.checkpoints.module_copy import filled_copy
from weightops.checkpoints.opening import CheckpointLike, open_any, open_checkpoint
from weightops.checkpoints.statistic_record import refuse_statistic
from weightops.checkpoints.ties import architecture_of_ends, with_tied_names
from weightops.errors import OptionError
from weightops.merging.methods.method import Method
from weightops.merging.methods.source import MethodSource
from weightops.merging.methods.table import MethodLike, as_method
from weightops.support.lazy import torch

_Lazy: TypeAlias = "str | Path | Checkpoint | Mapping[str, torch.Tensor]"
"""The kinds of models that are merged lazily."""


@overload
def merge(
    models: Sequence[_Lazy], method: MethodLike = ..., *, base: _Lazy | None = ..., **how: Any
) -> Checkpoint: ...
@overload
def merge(
    models: Sequence[CheckpointLike],
    method: MethodLike = ...,
    *,
    base: CheckpointLike | None = ...,
    **how: Any,
) -> Any: ...
def merge(
    models: Sequence[CheckpointLike],
    method: MethodLike = "linear",
    *,
    base: CheckpointLike | None = None,
    weights: Sequence[PerTensor] | None = None,
    alpha: PerTensor = 1.0,
    seed: int = 0,
    rank: int | None = None,
    statistics: Sequence[Mapping[str, CheckpointLike]] | None = None,
    strict: bool = False,
    align: bool = False,
    **options: Any,
) -> Any:
    """Merge models into one; files are merged when the result is saved or loaded.

    With a base, methods on task vectors give ``theta_base + alpha * m(theta_i - theta_base)``.

    Weights, alpha and options are each one value for all tensors, a mapping of name patterns to
    values (the first that matches counts; where none does, the default, which for alpha is 0), or a
    list of numbers over the depth of the layers. ``alpha={"lines": [0.1, 0.5]}`` is LiNeS (arXiv
    2410.17146), in which the tensors outside of the layers get the first number.

    Adapters are merged into weights with a base, and into one adapter without: no base is opened,
    and the result is exact for sums and averages.

    Args:
        models: the models to merge: paths, refs, checkpoints, state dicts or modules.
        method: the name of a method in `METHODS`, a `Method`, or a function that is one (see
            `weightops.method`).
        base: the model that task vectors are taken from. Methods on deltas need one. With a base,
            averages and arcs work on deltas, too.
        weights: one for each model; 1 by default.
        alpha: with a base, the coefficient of the merged delta.
        seed: the seed of methods that draw.
        rank: for adapters without a base, the most rank of the merged adapter.
        statistics: for methods that take them, kind -> statistic of each model, such as
            ``[{"gram": "a.gram.safetensors"}, {"gram": "b.gram.safetensors"}]``; see `collect`.
        strict: refuse models that are configured differently, and vectors that were made from
            another base, instead of warning.
        align: permute each model's units to be like those of the base, or of the first model, for
            models that were trained from different starts (Git Re-Basin, arXiv 2209.04836).
        options: the method's own options, such as ``density=0.2``; `Method.options` lists them.

    Returns:
        A lazy `Checkpoint` of the base's, or first model's, architecture. If that is a module, a
        new module of its class on its device. Of a state dict, too, a `Checkpoint`, as a mapping
        of names to tensors that need not fit into memory; its ``state_dict()`` computes all.

    Raises:
        UnknownNameError: for an unknown method, option, choice or pattern, with the nearest.
        OptionError: if the method needs a base, or takes none; or for a value that an option or
            a weight can't have.
        MismatchError: if names, shapes or dtypes differ, or a statistic is of another model; with
            ``strict=True`` also if configurations do.

    >>> import torch
    >>> merge([{"w": torch.zeros(2)}, {"w": torch.ones(2)}], "linear", weights=[1, 3])["w"]
    tensor([0.7500, 0.7500])
    """
    models = several(models, "merge")
    chosen = as_method(method)
    opened = [open_any(model) for model in models] if base is None else []
    adapters = _adapters(opened)
    if adapters:
        if align:
            raise OptionError("align permutes the units of whole models, not of adapters")
        plain = check_joinable(adapters)
        deltas = [LinearForm.of(adapter) for adapter in plain]
        source = MethodSource(chosen, deltas, weights=weights, seed=seed, options=options)
        return JoinedAdapter(source.as_form().times(alpha), plain, rank)
    _check(models, chosen, base is not None, alpha)
    if align and statistics is not None:
        raise OptionError("statistics are of models as they are, not of what align makes of them")
    if rank is not None:
        raise OptionError("a rank is for adapters that are merged without a base")
    opened = opened or [open_any(model) for model in models]
    for model in opened:
        refuse_statistic(model)
    start = open_checkpoint(opened[0] if base is None else base)
    if base is None:
        forms, start = _weights(opened, start, strict, align)
    else:
        forms, start = _deltas(opened, start, strict, align)
    source = MethodSource(
        chosen, forms, weights=weights, seed=seed, options=options, statistics=statistics
    )
    for of_models in source.statistics.of.values():
        for statistic, model in zip(of_models, opened, strict=True):
            statistic.check_model(model)
    merged = source.as_form()
    result = merged if base is None else start.form.plus(merged.times(alpha))
    like = models[0] if base is None else base
    if is_module(like):
        return filled_copy(like, result)
    return Checkpoint(result, architecture_of_ends(result, start))


def _weights(
    models: Sequence[Checkpoint], first: Checkpoint, strict: bool, align: bool
) -> tuple[list[LinearForm], Checkpoint]:
    """Return the forms of models, and the first of them with all the names that they have."""
    opened, whole = _with_ends(models[1:], first, strict)
    opened = [whole, *(_aligned(opened, whole) if align else opened)]
    for other in opened[1:]:
        check_match(whole.form, other.form)
    return [checkpoint.form for checkpoint in opened], whole


def _deltas(
    models: Sequence[CheckpointLike], base: Checkpoint, strict: bool, align: bool
) -> tuple[list[LinearForm], Checkpoint]:
    """Return the task vectors of models, and the base with all the names that they have."""
    opened, whole = _with_ends(models, base, strict)
    opened = _aligned(opened, whole) if align else opened
    return [LinearForm.difference(model.form, whole.form)[0] for model in opened], whole


def _with_ends(
    models: Sequence[CheckpointLike], first: Checkpoint, strict: bool
) -> tuple[list[Checkpoint], Checkpoint]:
    """Return models in the names of a first, all with the ends that one of them has untied."""
    opened = [open_matched(model, first, strict=strict) for model in models]
    whole = with_tied_names(first, [name for model in opened for name in model.specs])
    if whole is not first:
        opened = [open_matched(model, whole) for model in models]
    return [
        model if whole.specs.keys() <= model.specs.keys() else with_tied_names(model, whole.specs)
        for model in opened
    ], whole


def _aligned(models: Sequence[Checkpoint], reference: Checkpoint) -> list[Checkpoint]:
    from weightops.merging.alignment.aligned import align

    return [align(model, reference) for model in models]


def _adapters(models: Sequence[Checkpoint]) -> list[Source]:
    """Return the adapters that models are; empty if they are others, too."""
    adapters: list[Source] = []
    for model in models:
        sources = model.form.sources
        if not sources or not isinstance(sources[0], Adapter):
            return []
        adapters.append(sources[0])
    return adapters


def _check(
    models: Sequence[CheckpointLike], method: Method, has_base: bool, alpha: PerTensor
) -> None:
    """Refuse a method, a base or an alpha that don't go together."""
    hint = "name the model that task vectors are taken from: base=..."
    if not models:
        raise OptionError("there is nothing to merge")
    if has_base and not method.works_on("delta"):
        raise OptionError(f"{method.name} merges weights", hint="leave out base=")
    if not has_base and method.space == "delta":
        raise OptionError(f"{method.name} merges task vectors, and there is no base", hint=hint)
    if not has_base and alpha != 1.0:
        raise OptionError("alpha is a task vector's coefficient, and there is no base", hint=hint)
