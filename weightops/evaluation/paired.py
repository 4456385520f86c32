"""Compare two models on the same images: difference, interval, test, and which images changed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from weightops.algebra.precision import Precision
from weightops.checkpoints.checkpoint import Checkpoint
from weightops.checkpoints.opening import CheckpointLike
from weightops.engine.compare import compare
from weightops.evaluation.image_model import ImageModel
from weightops.evaluation.zero_shot import metrics, predict
from weightops.support.lazy import torch
from weightops.tasks.table import TaskList, as_tasks
from weightops.tasks.task import AlteredImages, Images, ImageSubset, Task

CONFIDENCE_95 = 1.959963984540054
"""The 97.5 % quantile of the normal distribution."""

_HALVINGS = 60


@dataclass(frozen=True)
class Change:
    """The difference of two models' accuracies on the same images.

    Attributes:
        difference: the accuracy of the second model minus that of the first.
        interval: a 95 % confidence interval of it.
        p_value: of the exact McNemar test that images are fixed as often as broken; of several
            tasks, over all their images together.
        fixed: how many images only the second model has right.
        broken: how many images only the first model has right.
        n: how many images there are.
        images: one entry for each image that the models classify differently: ``image`` (its file,
            or its number in the split), ``label``, ``before`` and ``after``.
    """

    difference: float
    interval: tuple[float, float]
    p_value: float
    fixed: int
    broken: int
    n: int
    images: Sequence[dict[str, Any]] = field(default=(), repr=False)

    def record(self) -> dict[str, Any]:
        """Return all of it for JSON."""
        return {**vars(self), "interval": list(self.interval), "images": list(self.images)}


def compare_accuracy(
    first: CheckpointLike | ImageModel,
    second: CheckpointLike | ImageModel,
    tasks: TaskList,
    *,
    split: str = "test",
    batch_size: int = 256,
    device: str = "auto",
    precision: Precision = "auto",
) -> dict[str, Change]:
    """Return how the accuracy of a second model differs from a first one's on the same images.

    Args:
        first: the model to compare with, see `evaluate`.
        second: the other model.
        tasks: a task or several.
        split: "test", "validation" or "train".
        batch_size: images at a time.
        device: "auto", "cpu", "cuda", ...
        precision: what the models are run in, see `evaluate`.

    Returns:
        Task -> change; `mean_change` makes one of those of several tasks.

    >>> compare_accuracy("embedded", "embedded", "shapes", split="validation")["shapes"]
    Change(difference=0.0, interval=(0.0, 0.0), p_value=1.0, fixed=0, broken=0, n=500)
    """
    listed = as_tasks(tasks)
    comparison = Comparison(listed, split)
    for given in (first, second):
        model = ImageModel.open(given, device, precision=precision)
        for task in listed:
            comparison.score(model, task, batch_size=batch_size)
        changes = comparison.changes(model)
    return changes


class Comparison:
    """Scores of several models, of which each is compared with the first on the same images.

    Args:
        tasks: the tasks.
        split: "test", "validation" or "train".

    Attributes:
        first: the first model's weights, once it is scored.
    """

    def __init__(self, tasks: Sequence[Task], split: str) -> None:
        self._tasks, self._split = tasks, split
        self.first: Checkpoint | None = None
        self._guesses: dict[str, torch.Tensor] = {}
        self._now: dict[str, torch.Tensor] = {}

    def score(
        self, model: ImageModel, task: Task, *, batch_size: int = 256, details: bool = False
    ) -> dict[str, Any]:
        """Return what `zero_shot` returns, and keep the predictions."""
        guesses = predict(model, task, self._split, batch_size=batch_size)
        self._now[task.name] = guesses[:, 0]
        labels = model.pixels(task, self._split).labels
        return metrics(guesses, labels, len(task.classes), details=details)

    def changes(self, model: ImageModel) -> dict[str, Change]:
        """Return task -> change from the first model; empty for the first one itself."""
        now, self._now = self._now, {}
        if self.first is None:
            self.first, self._guesses = model.base, now
            return {}
        one_model = partial(_have_equal_weights, self.first, model.base)
        return {
            task.name: change(
                self._guesses[task.name],
                now[task.name],
                task.load(self._split),
                task.classes,
                one_model=one_model,
            )
            for task in self._tasks
        }

    def add_changes(self, model: ImageModel, records: Sequence[Mapping[str, Any]]) -> list[Any]:
        """Return the records of a model with its changes, and one of the mean of several tasks."""
        changes = self.changes(model)
        if not changes or self.first is None:
            return list(records)
        ref = self.first.ref
        changed = [
            {**record, "change": {"from": ref, **changes[record["dataset"]].record()}}
            for record in records
        ]
        if len(changes) == 1:
            return changed
        mean = mean_change(changes.values())
        accuracy = math.fsum(record["metrics"]["acc1"] for record in records) / len(records)
        shared = {key: records[0][key] for key in ("model", "pretrained", "task", "language")}
        return [
            *changed,
            {
                "dataset": "mean",
                **shared,
                "metrics": {"acc1": accuracy, "n": mean.n},
                "split": self._split,
                "change": {"from": ref, **mean.record()},
            },
        ]


def _have_equal_weights(a: Checkpoint, b: Checkpoint) -> bool:
    """Return whether two models have the same numbers, in whatever dtypes they are stored."""
    wide = [model.to(torch.float32).form for model in (a, b)]
    if wide[0].specs != wide[1].specs:
        return False
    return not any(difference.other for difference in compare(*wide).values())


def change(
    before: torch.Tensor,
    after: torch.Tensor,
    images: Images,
    classes: Sequence[str],
    *,
    one_model: Callable[[], bool] = lambda: False,
) -> Change:
    """Return the change from one model's predictions to another's.

    Args:
        before: the first model's classes, shape ``(n,)``.
        after: the second model's.
        images: the images, with their labels.
        classes: the names of the classes.
        one_model: returns whether both have the same weights: then no image would ever change. It
            is asked where none of these does.
    """
    labels = torch.as_tensor(images.labels)
    right = before == labels, after == labels
    fixed, broken = int((right[1] & ~right[0]).sum()), int((right[0] & ~right[1]).sum())
    changed = (before != after).nonzero().flatten().tolist()
    listed = [
        {
            "image": image_name(images, i),
            "label": classes[int(labels[i])],
            "before": classes[int(before[i])],
            "after": classes[int(after[i])],
        }
        for i in changed
    ]
    n = len(labels)
    interval = (0.0, 0.0) if not changed and one_model() else score_interval(fixed, broken, n)
    return Change((fixed - broken) / n, interval, mcnemar(fixed, broken), fixed, broken, n, listed)


def mean_change(changes: Iterable[Change]) -> Change:
    """Return the mean of the changes on several tasks, each task counted alike.

    Its interval is put together from those of the tasks, whose images are independent: the
    distance to each end is the root of the summed squares of theirs (Zou and Donner 2008).
    """
    listed = list(changes)
    mean = math.fsum(one.difference for one in listed) / len(listed)
    below, above = (
        math.sqrt(math.fsum((one.difference - one.interval[end]) ** 2 for one in listed))
        / len(listed)
        for end in (0, 1)
    )
    fixed, broken = sum(one.fixed for one in listed), sum(one.broken for one in listed)
    n = sum(one.n for one in listed)
    return Change(mean, (mean - below, mean + above), mcnemar(fixed, broken), fixed, broken, n)


def mcnemar(fixed: int, broken: int) -> float:
    """Return the two-sided p-value of the exact McNemar test (McNemar 1947).

    It is ``min(1, 2 P(X <= min(fixed, broken)))`` for a binomial X of ``fixed + broken`` fair
    coins.

    >>> mcnemar(0, 0), mcnemar(5, 0), mcnemar(3, 3)
    (1.0, 0.0625, 1.0)
    """
    total, least = fixed + broken, min(fixed, broken)
    logs = [
        math.lgamma(total + 1) - math.lgamma(i + 1) - math.lgamma(total - i + 1)
        for i in range(least + 1)
    ]
    top = max(logs)
    tail = math.fsum(math.exp(value - top) for value in logs)
    return min(1.0, math.exp(top + math.log(2 * tail) - total * math.log(2)))


def score_interval(
    fixed: int, broken: int, n: int, *, z: float = CONFIDENCE_95
) -> tuple[float, float]:
    """Return Tango's score interval of the difference of two paired shares (Tango 1998).

    It holds the differences that the score test doesn't reject. Unlike the interval of the normal
    distribution, it has its nominal coverage where few images change, too.

    Args:
        fixed: the pairs of which only the second is right.
        broken: the pairs of which only the first is right.
        n: all pairs.
        z: the normal quantile of the confidence.

    >>> [round(end, 4) for end in score_interval(14, 5, 100)]
    [0.005, 0.1808]
    """

    def statistic(delta: float) -> float:
        """Return the score statistic of a true difference, which falls with it."""
        linear = -fixed - broken + (2 * n - fixed + broken) * delta
        root = math.sqrt(max(linear**2 + 8 * n * broken * delta * (1 - delta), 0.0))
        share = (root - linear) / (4 * n)  # the likeliest share of broken pairs
        variance = n * (2 * share + delta * (1 - delta))
        gap = fixed - broken - n * delta
        return gap / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, gap)

    estimate = (fixed - broken) / n
    return (
        _crossing(lambda delta: statistic(delta) <= z, -1.0, estimate),
        _crossing(lambda delta: statistic(delta) <= -z, estimate, 1.0),
    )


def _crossing(holds: Callable[[float], bool], low: float, high: float) -> float:
    """Return where a condition begins to hold, between two numbers."""
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def image_name(images: Images, index: int) -> str | int:
    """Return the class folder and name of an image's file, or its number if it is in no file."""
    if isinstance(images, ImageSubset):
        inner = image_name(images.images, int(images.indices[index]))
        return inner if isinstance(inner, str) else index
    if isinstance(images, AlteredImages):
        return image_name(images.images, index)
    files: Sequence[Path] | None = getattr(images, "files", None)
    return index if files is None else "/".join(Path(files[index]).parts[-2:])
