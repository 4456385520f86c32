"""Measure how far apart two task vectors do their work: disentanglement (arXiv 2305.12827)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np

from weightops.checkpoints.opening import CheckpointLike
from weightops.errors import OptionError
from weightops.evaluation.zero_shot import predict
from weightops.search.session import EditSession
from weightops.support.arguments import check_arguments
from weightops.support.lazy import torch
from weightops.support.ranges import Range
from weightops.task_vector import TaskVector
from weightops.tasks.table import TaskList, as_tasks

ALPHAS = tuple(round(-2 + 0.5 * i, 1) for i in range(9))


@dataclass(frozen=True)
class Disentanglement:
    """The disentanglement error of two task vectors.

    Attributes:
        tasks: the names of the two tasks.
        alphas: the coefficients.
        errors: the error at each pair of coefficients, the first task's first, shape ``(n, n)``.
    """

    tasks: tuple[str, str]
    alphas: tuple[float, ...]
    errors: torch.Tensor

    @property
    def mean(self) -> float:
        """The mean error over all pairs."""
        return float(self.errors.mean())


def disentanglement(
    base: CheckpointLike,
    vectors: Sequence[CheckpointLike | TaskVector],
    tasks: TaskList,
    *,
    alphas: Sequence[float] = ALPHAS,
    images: Annotated[int, Range(min=1)] = 128,
    split: str = "validation",
    device: str = "auto",
) -> Disentanglement:
    """Measure how much two task vectors change each other's predictions when they are added.

        error(a_1, a_2) = sum_t mean_x [ f(x; theta + a_t tau_t) != f(x; theta + a_1 tau_1 + a_2
        tau_2) ]

    over images x of task t. It is 0 where each vector acts on its own task alone, and at most 2.
    Linearised vectors are measured on the linearised model.

    Source: weight disentanglement, arXiv 2305.12827.

    Args:
        base: the model that the vectors are of.
        vectors: two task vectors, or fine-tuned weights.
        tasks: the task of each.
        alphas: the coefficients to try, for both.
        images: the most images of each task.
        split: the images to use.
        device: "auto", "cpu", "cuda", ...

    Raises:
        OptionError: for other than two vectors with a task each.

    >>> found = disentanglement("embedded", ["embedded"] * 2, ["mnist", "digits"], images=2)
    >>> found.mean
    0.0
    """
    check_arguments(disentanglement, images=images)
    listed = as_tasks(tasks)
    if len(vectors) != 2 or len(listed) != 2:
        raise OptionError(
            f"the disentanglement error is of two vectors with a task each, and there are "
            f"{len(vectors)} vectors and {len(listed)} tasks"
        )
    session = EditSession(base, listed, device=device)
    given = [session.vector(vector) for vector in vectors]

    def guesses(place: int, coefficients: Sequence[float]) -> torch.Tensor:
        edit = given[0] * coefficients[0] + given[1] * coefficients[1]
        edit.apply_(session.model.module, base=session.base)
        size = min(images, len(session.model.pixels(listed[place], split)))
        return predict(session.model, listed[place], split, only=np.arange(size))[:, 0]

    errors = torch.zeros(len(alphas), len(alphas), dtype=torch.float64)
    for place in range(2):
        for i, own in enumerate(alphas):
            alone = guesses(place, (own, 0.0) if place == 0 else (0.0, own))
            for j, other in enumerate(alphas):
                both = guesses(place, (own, other) if place == 0 else (other, own))
                at = (i, j) if place == 0 else (j, i)
                errors[at] += (both != alone).double().mean()
    return Disentanglement((listed[0].name, listed[1].name), tuple(alphas), errors)
