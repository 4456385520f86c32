"""Average and interpolate weights; results are of the kind of the first model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload

from weightops.algebra.linear_form import Alpha
from weightops.checkpoints.checkpoint import Checkpoint
from weightops.checkpoints.kinds import kind_of, several
from weightops.checkpoints.opening import CheckpointLike
from weightops.errors import OptionError
from weightops.task_vector import M, TaskVector


@overload
def interpolate(a: M, b: CheckpointLike, alpha: Alpha) -> M: ...
@overload
def interpolate(a: str | Path, b: CheckpointLike, alpha: Alpha) -> Checkpoint: ...
def interpolate(a: Any, b: CheckpointLike, alpha: Alpha) -> Any:
    """Interpolate linearly: ``(1 - alpha) * a + alpha * b`` (arXiv 2208.05592).

    Args:
        a: the weights at ``alpha = 0``; the result is of their kind (a module, a dict, or a lazy
            `Checkpoint`).
        b: the weights at ``alpha = 1``.
        alpha: a number, or a mapping of name patterns to numbers.

    >>> import torch
    >>> interpolate({"w": torch.zeros(2)}, {"w": torch.ones(2)}, 0.25)["w"]
    tensor([0.2500, 0.2500])
    """
    return TaskVector(a, b).apply(a, alpha)


@overload
def average(models: Sequence[M], weights: Sequence[float] | None = None) -> M: ...
@overload
def average(models: Sequence[str | Path], weights: Sequence[float] | None = None) -> Checkpoint: ...
def average(models: Sequence[Any], weights: Sequence[float] | None = None) -> Any:
    """Average models: ``sum_i w_i theta_i / sum_i w_i`` (arXiv 2203.05482).

    Args:
        models: the weights; the result is of the kind of the first.
        weights: a number for each model; 1 by default.

    Raises:
        OptionError: if there are no models, not one weight for each, or the weights sum to 0.
        MismatchError: if names, shapes or dtypes differ.

    >>> import torch
    >>> average([{"w": torch.zeros(2)}, {"w": torch.ones(2)}], weights=[1, 3])["w"]
    tensor([0.7500, 0.7500])
    """
    models = several(models, "average")
    try:
        weights = [1.0] * len(models) if weights is None else [float(w) for w in weights]
    except (TypeError, ValueError) as error:
        raise OptionError(
            f"weights is {kind_of(weights)}, and must be a number for each model",
            hint="average([a, b], weights=[1, 3])",
        ) from error
    total = math.fsum(weights)
    if not models or len(weights) != len(models) or total == 0:
        raise OptionError(
            "average needs at least one model and as many weights, with a sum other than 0; got "
            f"{len(models)} and {weights}"
        )
    first, *rest = models
    vectors = [
        TaskVector(first, model) * (weight / total)
        for model, weight in zip(rest, weights[1:], strict=True)
    ]
    zero = TaskVector(first, first)
    return sum(vectors, zero).apply(first)
