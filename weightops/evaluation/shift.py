"""The same task under corruptions: accuracy under distribution shift, and effective robustness (arXiv 1903.12261, 2007.00644)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from weightops.checkpoints.opening import CheckpointLike
from weightops.evaluation.image_model import ImageModel
from weightops.evaluation.zero_shot import zero_shot
from weightops.tasks.corrupted import CORRUPTIONS, SEVERITIES, CorruptedImages, corrupted
from weightops.tasks.table import as_tasks
from weightops.tasks.task import Task


def shift(
    model: CheckpointLike | ImageModel | Callable[[Task, str], float],
    task: str | Task,
    *,
    split: str = "test",
    corruptions: Iterable[str] | None = None,
    severities: Sequence[int] = SEVERITIES,
    batch_size: int = 256,
    device: str = "auto",
) -> dict[str, Any]:
    """Accuracy on a task as it is, and under corruptions of its images.

    Args:
        model: what `evaluate` takes, or a function ``(task, split) -> accuracy`` for any other model.
        task: a name or a `Task`.
        split: "test", "validation" or "train".
        corruptions: names in `CORRUPTIONS`; all by default.
        severities: from 1 to 5.
        batch_size: images at a time.
        device: "auto", "cpu", "cuda", ...

    Returns:
        ``in_distribution``, ``under_shift`` (the mean over corruptions and severities), and ``corruptions``: name -> severity -> accuracy,
        each in [0, 1].
    """
    [task] = as_tasks(task)
    accuracy = _accuracy_of(model, device, batch_size)
    names = list(CORRUPTIONS) if corruptions is None else list(corruptions)
    table = {
        name: {
            str(severity): accuracy(corrupted(task, name, severity), split)
            for severity in severities
        }
        for name in names
    }
    scores = [value for row in table.values() for value in row.values()]
    mean = math.fsum(scores) / len(scores) if scores else math.nan
    return {"in_distribution": accuracy(task, split), "under_shift": mean, "corruptions": table}


def _accuracy_of(
    model: CheckpointLike | ImageModel | Callable[[Task, str], float], device: str, batch_size: int
) -> Callable[[Task, str], float]:
    if not isinstance(model, (str, Path, Mapping, nn.Module, ImageModel)):
        return model
    clip = ImageModel.open(model, device)

    def accuracy(task: Task, split: str) -> float:
        scores = zero_shot(clip, task, split, batch_size=batch_size)
        if isinstance(task.load(split), CorruptedImages):
            clip.forget(task)  # it is seen once
        return float(scores["acc1"])

    return accuracy


def under_shift(
    clip: ImageModel, task: Task, split: str, *, batch_size: int = 256, details: bool = False
) -> dict[str, Any]:
    """What `zero_shot` gives, and ``acc1_under_shift``, the mean over corruptions, and ``acc1_under_corruption``, each: see `shift`."""
    scores = zero_shot(clip, task, split, batch_size=batch_size, details=details)
    found = shift(clip, task, split=split, batch_size=batch_size)
    return {
        **scores,
        "acc1_under_shift": found["under_shift"],
        "acc1_under_corruption": found["corruptions"],
    }


def effective_robustness(
    point: tuple[float, float], references: Sequence[tuple[float, float]]
) -> float:
    r"""Accuracy under shift beyond what accuracy in distribution predicts (arXiv 2007.00644).

    :math:`\rho = y - \sigma(a\,\mathrm{logit}(x) + b)`, with the line fitted by least squares to the reference models.

    Args:
        point: accuracies in distribution and under shift, in [0, 1].
        references: the same of at least two models that differ in distribution.

    Returns:
        A difference of accuracies; NaN if the references don't give a line.

    >>> round(effective_robustness((0.8, 0.7), [(0.5, 0.4), (0.9, 0.6)]), 3)
    0.173
    """
    x, y = (
        (np.array(values) for values in zip(*references, strict=True))
        if references
        else (np.empty(0), np.empty(0))
    )
    if len(np.unique(x)) < 2:
        return math.nan
    slope, intercept = np.polyfit(_logit(x), _logit(y), 1)
    return float(point[1] - 1 / (1 + np.exp(-(slope * _logit(np.array(point[0])) + intercept))))


def add_robustness(
    results: Sequence[Mapping[str, Any]], references: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Results of `under_shift`, as `record` writes them, with ``effective_robustness`` beyond those of other models on the same task."""

    def point(result: Mapping[str, Any]) -> tuple[float, float]:
        return result["metrics"]["acc1"], result["metrics"]["acc1_under_shift"]

    def robustness(result: Mapping[str, Any]) -> float:
        return effective_robustness(
            point(result), [point(r) for r in references if r["dataset"] == result["dataset"]]
        )

    return [
        {**r, "metrics": {**r["metrics"], "effective_robustness": robustness(r)}} for r in results
    ]


def _logit(p: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    p = np.clip(p, 1e-3, 1 - 1e-3)
    return np.log(p / (1 - p))
