"""Accuracy under distribution shift, and effective robustness (arXiv 1903.12261, 2007.00644)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from weightops.algebra.precision import Precision
from weightops.checkpoints.opening import CheckpointLike
from weightops.evaluation.image_model import ImageModel
from weightops.evaluation.zero_shot import zero_shot
from weightops.support.lazy import nn
from weightops.tasks.corrupted import CORRUPTIONS, SEVERITIES, CorruptedImages, corrupted
from weightops.tasks.table import TaskLike, as_task
from weightops.tasks.task import Task

AccuracyFunction = Callable[[Task, str], float]
"""A function of a task and a split's name that returns an accuracy."""


def shift(
    model: CheckpointLike | ImageModel | AccuracyFunction,
    task: TaskLike,
    *,
    split: str = "test",
    corruptions: Iterable[str] | None = None,
    severities: Sequence[int] = SEVERITIES,
    batch_size: int = 256,
    device: str = "auto",
    precision: Precision = "auto",
) -> dict[str, Any]:
    """Measure the accuracy on a task, and under corruptions of its images.

    Args:
        model: what `evaluate` takes, or for any other model a function of a task and a split's name
            that returns an accuracy.
        task: a task or its name.
        split: "test", "validation" or "train".
        corruptions: names in `CORRUPTIONS`; all by default.
        severities: numbers from 1 to 5.
        batch_size: images at a time.
        device: "auto", "cpu", "cuda", ...
        precision: as for `evaluate`.

    Returns:
        ``in_distribution``; ``under_shift``, the mean over corruptions and severities; and
        ``corruptions``: name -> severity -> accuracy; each in [0, 1].
    """
    task = as_task(task)
    accuracy = _accuracy_function(model, device, precision, batch_size)
    table = {
        name: {str(s): accuracy(corrupted(task, name, s), split) for s in severities}
        for name in (CORRUPTIONS if corruptions is None else corruptions)
    }
    scores = [score for row in table.values() for score in row.values()]
    mean = math.fsum(scores) / len(scores) if scores else math.nan
    return {"in_distribution": accuracy(task, split), "under_shift": mean, "corruptions": table}


def _accuracy_function(
    model: CheckpointLike | ImageModel | AccuracyFunction,
    device: str,
    precision: Precision,
    batch_size: int,
) -> AccuracyFunction:
    if not isinstance(model, (str, Path, Mapping, nn.Module, ImageModel)):
        return model
    image_model = ImageModel.open(model, device, precision=precision)

    def accuracy(task: Task, split: str) -> float:
        scores = zero_shot(image_model, task, split, batch_size=batch_size)
        if isinstance(task.load(split), CorruptedImages):
            image_model.forget(task)  # its images are used once
        return float(scores["acc1"])

    return accuracy


def under_shift(
    model: ImageModel, task: Task, split: str, *, batch_size: int = 256, details: bool = False
) -> dict[str, Any]:
    """Measure zero-shot accuracy, also under corruptions: see `zero_shot` and `shift`.

    Returns:
        The metrics of `zero_shot`; ``acc1_under_shift``, the mean over corruptions and severities;
        and ``acc1_under_corruption``: name -> severity -> accuracy.
    """
    scores = zero_shot(model, task, split, batch_size=batch_size, details=details)
    shifted = shift(model, task, split=split, batch_size=batch_size)
    return {
        **scores,
        "acc1_under_shift": shifted["under_shift"],
        "acc1_under_corruption": shifted["corruptions"],
    }


def effective_robustness(
    point: tuple[float, float], references: Sequence[tuple[float, float]]
) -> float:
    """Return the accuracy under shift beyond the one that reference models predict.

    The effective robustness (arXiv 2007.00644) is ``y - sigmoid(a * logit(x) + b)`` for the
    accuracies x in distribution and y under shift. The line is fitted to the reference models by
    least squares on logits.

    Args:
        point: accuracies of the model in distribution and under shift, in [0, 1].
        references: accuracies of at least two models that differ in distribution.

    Returns:
        A difference of accuracies; NaN if the references don't determine a line.

    >>> round(effective_robustness((0.8, 0.7), [(0.5, 0.4), (0.9, 0.6)]), 3)
    0.173
    """
    x = np.array([in_distribution for in_distribution, _ in references])
    y = np.array([shifted for _, shifted in references])
    if len(np.unique(x)) < 2:
        return math.nan
    slope, intercept = np.polyfit(_logit(x), _logit(y), 1)
    predicted = 1 / (1 + np.exp(-(slope * _logit(np.array(point[0])) + intercept)))
    return float(point[1] - predicted)


def add_robustness(
    results: Sequence[Mapping[str, Any]], references: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Return results of `under_shift` with their ``effective_robustness`` added.

    Args:
        results: results as `record` returns them.
        references: results of the reference models, on the same tasks.
    """

    def point(result: Mapping[str, Any]) -> tuple[float, float]:
        return result["metrics"]["acc1"], result["metrics"]["acc1_under_shift"]

    def robustness(result: Mapping[str, Any]) -> float:
        same_task = [point(r) for r in references if r["dataset"] == result["dataset"]]
        return effective_robustness(point(result), same_task)

    return [
        {**r, "metrics": {**r["metrics"], "effective_robustness": robustness(r)}} for r in results
    ]


def _logit(p: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    p = np.clip(p, 1e-3, 1 - 1e-3)
    return np.log(p / (1 - p))
