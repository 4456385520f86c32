"""Merge checkpoints by any method."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from weightops.algebra.linear_form import LinearForm, check_match
from weightops.algebra.names import PerTensor
from weightops.checkpoints.checkpoint import Checkpoint
from weightops.checkpoints.matching import open_matched
from weightops.checkpoints.opening import CheckpointLike, open_checkpoint
from weightops.errors import WeightopsError
from weightops.merging.methods.source import MethodSource
from weightops.merging.methods.table import METHODS


def merge(
    models: Sequence[CheckpointLike],
    method: str = "linear",
    *,
    base: CheckpointLike | None = None,
    weights: Sequence[PerTensor] | None = None,
    alpha: PerTensor = 1.0,
    seed: int = 0,
    **options: Any,
) -> Checkpoint:
    r"""Merge models into one: for methods on task vectors :math:`\theta_{base} + \alpha\,m(\theta_i - \theta_{base})`.

    Nothing is computed until the result is saved or loaded; then one tensor after another is. Weights, alpha and options are
    each one value for all tensors, a mapping of name patterns to values (the first that matches counts; where none does, the default,
    which for alpha is 0), or a list of numbers over the depth of the layers: ``alpha=[0.1, 0.5]`` is LiNeS (arXiv 2410.17146).

    Args:
        models: what to merge.
        method: a name in `METHODS`.
        base: what the task vectors are taken from. Needed by methods on deltas; averages and arcs work on deltas where it is given.
        weights: one for each model; 1 by default.
        alpha: with a base, the coefficient of the merged delta.
        seed: of methods that draw.
        options: the method's own.

    Returns:
        A lazy `Checkpoint` of the base's (or first model's) architecture.

    Raises:
        UnknownNameError: for a method, option or choice that isn't known, or a pattern that matches nothing.
        MismatchError: if names, shapes or dtypes differ.

    >>> import torch
    >>> merge([{"w": torch.zeros(2)}, {"w": torch.ones(2)}], "linear", weights=[1, 3])["w"]
    tensor([0.7500, 0.7500])
    """
    chosen = METHODS[method]
    if not models:
        raise WeightopsError("there is nothing to merge")
    if base is None:
        if chosen.space == "delta":
            raise WeightopsError(
                f"{method} works on task vectors: say which base they are taken from (--base)"
            )
        if alpha != 1.0:
            raise WeightopsError(
                "alpha is the coefficient of a task vector: say which base it is taken from (--base)"
            )
        first = open_checkpoint(models[0])
        opened = [first, *(open_matched(model, first) for model in models[1:])]
        for other in opened[1:]:
            check_match(opened[0].form, other.form)
        form = MethodSource(
            chosen, [c.form for c in opened], weights=weights, seed=seed, options=options
        ).as_form()
        return Checkpoint(form, opened[0].architecture)
    start = open_checkpoint(base)
    if not chosen.works_on("delta"):
        raise WeightopsError(f"{method} works on weights: it takes no base")
    opened = [open_matched(model, start) for model in models]
    deltas = [LinearForm.difference(c.form, start.form)[0] for c in opened]
    merged = MethodSource(chosen, deltas, weights=weights, seed=seed, options=options).as_form()
    return Checkpoint(start.form.plus(merged.times(alpha)), start.architecture)
