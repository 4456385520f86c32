"""Merge checkpoints by any method."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from weightops.checkpoints.checkpoint import Checkpoint, CheckpointLike, open_checkpoint
from weightops.checkpoints.likeness import open_like
from weightops.errors import WeightopsError
from weightops.expression import Alpha, LinearForm, check_match
from weightops.methods.method import MethodSource
from weightops.methods.table import METHODS


def merge(
    models: Sequence[CheckpointLike], method: str = "linear", *, base: CheckpointLike | None = None, weights: Sequence[float] | None = None,
    alpha: Alpha = 1.0, seed: int = 0, **options: Any,
) -> Checkpoint:  # fmt: skip
    r"""Merge models into one: for methods on task vectors :math:`\theta_{base} + \alpha\,m(\theta_i - \theta_{base})`.

    Nothing is computed until the result is saved or loaded; then one tensor after another is.

    Args:
        models: what to merge.
        method: a name in `METHODS`.
        base: what the task vectors are taken from; needed by methods on deltas. For methods on weights it must be left out.
        weights: one number for each model; 1 by default.
        alpha: for methods on deltas, the coefficient of the merged delta: a number or a mapping of name patterns to numbers.
        seed: of methods that draw.
        options: the method's own.

    Returns:
        A lazy `Checkpoint` of the base's (or first model's) architecture.

    Raises:
        UnknownNameError: for a method, option or choice that isn't known.
        MismatchError: if names, shapes or dtypes differ.

    >>> import torch
    >>> merge([{"w": torch.zeros(2)}, {"w": torch.ones(2)}], "linear", weights=[1, 3])["w"]
    tensor([0.7500, 0.7500])
    """
    chosen = METHODS[method]
    if not models:
        raise WeightopsError("there is nothing to merge")
    if not chosen.takes_deltas:
        if base is not None or alpha != 1.0:
            raise WeightopsError(f"{method} works on weights: it takes neither a base nor an alpha")
        first = open_checkpoint(models[0])
        opened = [first, *(open_like(model, first) for model in models[1:])]
        for other in opened[1:]:
            check_match(opened[0].form, other.form)
        source = MethodSource(chosen, [c.form for c in opened], weights=weights, seed=seed, options=options)
        return Checkpoint(LinearForm.of(source), opened[0].architecture)
    if base is None:
        raise WeightopsError(f"{method} works on task vectors: say which base they are taken from")
    start = open_checkpoint(base)
    opened = [open_like(model, start) for model in models]
    deltas = [LinearForm.difference(c.form, start.form)[0] for c in opened]
    source = MethodSource(chosen, deltas, base=start.form, weights=weights, seed=seed, options=options)
    return Checkpoint(start.form.plus(LinearForm.of(source).times(alpha)), start.architecture)
