"""Units of scores: how a score is named, shown and compared.

A search knows one value for each sample of a task, the higher the better, and their mean. A unit
turns means into the numbers that people read.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from weightops.errors import OptionError
from weightops.support.lazy import torch
from weightops.support.text import counted
from weightops.tasks.scored import ScoredTask
from weightops.tasks.task import Task
from weightops.tasks.texts import TextTask

Z_95 = 1.96
"""Standard errors to either side that make a 95 % confidence interval."""


class Unit(ABC):
    """The unit of a score.

    Attributes:
        metric: the score's key in metrics.
        name: its name in sentences.
        title: its name over a column.
        plural: its name for many.
        sign: what stands after a number of it, or in its place.
        best: its name where it is to be as good as possible.
        least: its name where it is to be as bad as possible.
        gain, gained: the verb for a score that gets better, and its past.
        samples: what is measured.
        start: the name of the unedited model in pictures.
        mark: what stands behind a number of it in pictures and titles.
        told: what a heading says of the numbers that changes are told in.
        numbers: what a model card says of the numbers.
        factor: what scores are multiplied by in pictures.
        range: the lowest and the highest mean of values.
        change_range: the lowest and the highest change.
    """

    metric: ClassVar[str]
    name: ClassVar[str]
    title: ClassVar[str]
    plural: ClassVar[str]
    sign: ClassVar[str]
    best: ClassVar[str]
    least: ClassVar[str]
    gain: ClassVar[str]
    gained: ClassVar[str]
    samples: ClassVar[str]
    start: ClassVar[str]
    mark: ClassVar[str]
    told: ClassVar[str]
    numbers: ClassVar[str]
    factor: ClassVar[float]
    range: ClassVar[tuple[float, float]]
    change_range: ClassVar[tuple[float, float]]

    @abstractmethod
    def reading(self, value: float) -> float:
        """Return the score that a mean of the samples' values stands for."""

    @abstractmethod
    def shown(self, value: float) -> str:
        """Return a mean of values for a sentence."""

    @abstractmethod
    def cell(self, reading: float) -> str:
        """Return a score for a table."""

    @abstractmethod
    def mean(self, readings: Sequence[float]) -> float:
        """Return the mean of scores of several tasks."""

    @abstractmethod
    def share(self, reading: float, reference: float) -> float:
        """Return a score as a share of another; NaN of one that is 0."""

    @abstractmethod
    def change(self, difference: float) -> float:
        """Return what a difference of means is as a change of the score."""

    @abstractmethod
    def change_from(self, before: float, after: float) -> float:
        """Return the change from a score to another, as `change` gives it."""

    @abstractmethod
    def interval(self, values: torch.Tensor) -> tuple[float, float]:
        """Return the 95 % confidence interval of the score of samples with these values."""

    @abstractmethod
    def normalizing(self, experts: Mapping[str, float]) -> dict[str, Any]:
        """Return the ``score`` of a goal whose values are shares of experts', and what it needs.

        Args:
            experts: task -> mean value of the model that was fine-tuned on it.
        """

    @abstractmethod
    def kept_share(self, share: float) -> tuple[float, float]:
        """Return the ``ratio`` and ``drop`` of a goal that keeps a share of the base's score."""

    @abstractmethod
    def kept_but(self, drop: float) -> tuple[float, float]:
        """Return the ``ratio`` and ``drop`` of a goal that lets the score get worse by that."""

    @abstractmethod
    def bound(self, ratio: float, drop: float) -> str:
        """Return in words what ``ratio * base - drop`` allows."""

    def of(self, scores: Mapping[str, Any]) -> float:
        """Return the score among a task's metrics."""
        return float(scores[self.metric])

    def labelled(self, value: float) -> str:
        """Return a mean of values as the label of a point in a picture."""
        return self.cell(self.reading(value)) + self.mark

    def in_cell(self, scores: Mapping[str, Any]) -> str:
        """Return the score among a task's metrics, for a table."""
        return self.cell(self.of(scores))


class _Accuracy(Unit):
    metric, name, title, samples = "acc1", "accuracy", "accuracy (%)", "images"
    plural, sign = "accuracies in %", "%"
    best, least, gain, gained = "best", "lowest", "rise", "rose"
    start, mark, told = "zero-shot", " %", ", points"
    numbers = "top-1 accuracies in percent"
    factor, range, change_range = 100.0, (0.0, 1.0), (-1.0, 1.0)

    def reading(self, value: float) -> float:
        return value

    def shown(self, value: float) -> str:
        return f"{value:.2%}"

    def cell(self, reading: float) -> str:
        return "-" if math.isnan(reading) else f"{100 * reading:.1f}"

    def mean(self, readings: Sequence[float]) -> float:
        return math.fsum(readings) / len(readings)

    def share(self, reading: float, reference: float) -> float:
        return reading / reference if reference else math.nan

    def change(self, difference: float) -> float:
        return difference

    def change_from(self, before: float, after: float) -> float:
        return after - before

    def interval(self, values: torch.Tensor) -> tuple[float, float]:
        """Return Wilson's interval."""
        n, p = len(values), values.double().mean().item()
        centre = p + Z_95 * Z_95 / (2 * n)
        half = Z_95 * math.sqrt(p * (1 - p) / n + Z_95 * Z_95 / (4 * n * n))
        return (centre - half) / (1 + Z_95 * Z_95 / n), (centre + half) / (1 + Z_95 * Z_95 / n)

    def normalizing(self, experts: Mapping[str, float]) -> dict[str, Any]:
        return {"score": {task: 1 / max(value, 1e-9) for task, value in experts.items()}}

    def kept_share(self, share: float) -> tuple[float, float]:
        return share, 0.0

    def kept_but(self, drop: float) -> tuple[float, float]:
        return 1.0, drop

    def bound(self, ratio: float, drop: float) -> str:
        if ratio != 1:
            return f"at least {100 * ratio:g} % of"
        return f"at most {counted(100 * drop, 'point')} under"


class _Perplexity(Unit):
    """Perplexity ``exp(-v)``, where v is the mean log-likelihood of a token, in nats.

    The mean of several perplexities is the geometric one.
    """

    metric, name, title, samples = "perplexity", "perplexity", "perplexity", "blocks"
    plural, sign = "perplexities", "perplexity"
    best, least, gain, gained = "lowest", "highest", "fall", "fell"
    start, mark, told, numbers = "base", "", ", %", "perplexities"
    factor, range, change_range = 1.0, (-math.inf, 0.0), (-1.0, math.inf)

    def reading(self, value: float) -> float:
        return _exp(-value)

    def shown(self, value: float) -> str:
        return f"{self.reading(value):.5g}"

    def cell(self, reading: float) -> str:
        if math.isnan(reading):
            return "-"
        return f"{reading:.2f}" if reading < 1000 else f"{reading:.4g}"

    def mean(self, readings: Sequence[float]) -> float:
        return _exp(math.fsum(map(math.log, readings)) / len(readings))

    def share(self, reading: float, reference: float) -> float:
        return reference / reading

    def change(self, difference: float) -> float:
        return _exp(-difference) - 1

    def change_from(self, before: float, after: float) -> float:
        return after / before - 1

    def interval(self, values: torch.Tensor) -> tuple[float, float]:
        losses = -values.double()
        half = Z_95 * losses.std(unbiased=False).item() / math.sqrt(len(losses))
        mean = losses.mean().item()
        return _exp(max(mean - half, 0.0)), _exp(mean + half)

    def normalizing(self, experts: Mapping[str, float]) -> dict[str, Any]:
        return {"score": dict.fromkeys(experts, 1.0), "reference": experts}

    def kept_share(self, share: float) -> tuple[float, float]:
        return self.kept_but(1 - share)

    def kept_but(self, drop: float) -> tuple[float, float]:
        return 1.0, math.log1p(drop)

    def bound(self, ratio: float, drop: float) -> str:
        return f"at most {100 * math.expm1(drop):.4g} % above"


class _Score(_Accuracy):
    """Scores of a program, which may be any numbers: the higher, the better."""

    metric, name, title, samples = "score", "score", "score", "items"
    plural, sign = "scores", "score"
    start, mark, told, numbers = "base", "", "", "a program's"
    factor, range, change_range = 1.0, (-math.inf, math.inf), (-math.inf, math.inf)

    def shown(self, value: float) -> str:
        return f"{value:.4g}"

    def cell(self, reading: float) -> str:
        return f"{reading:.4g}"

    def interval(self, values: torch.Tensor) -> tuple[float, float]:
        values = values.double()
        half = Z_95 * values.std(unbiased=False).item() / math.sqrt(len(values))
        return values.mean().item() - half, values.mean().item() + half

    def normalizing(self, experts: Mapping[str, float]) -> dict[str, Any]:
        bad = [task for task, value in experts.items() if value <= 0]
        if bad:
            raise OptionError(
                f"the score of {bad[0]} isn't above 0, so that there is no share of it",
                hint="objective='mean'",
            )
        return super().normalizing(experts)

    def bound(self, ratio: float, drop: float) -> str:
        if ratio != 1:
            return super().bound(ratio, drop)
        return f"at most {drop:g} under"


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf


ACCURACY: Unit = _Accuracy()
PERPLEXITY: Unit = _Perplexity()
SCORE: Unit = _Score()
UNITS = (ACCURACY, PERPLEXITY, SCORE)


def unit_of(scores: Mapping[str, Any]) -> Unit:
    """Return the unit of the main score among a task's metrics."""
    return next((unit for unit in UNITS if unit.metric in scores), ACCURACY)


def unit_for(tasks: Sequence[Task]) -> Unit:
    """Return the unit of tasks, which are measured together.

    Raises:
        OptionError: if they are of several kinds.
    """
    by_unit: dict[Unit, Task] = {}
    for task in tasks:
        by_unit.setdefault(_kind(task)[0], task)
    if len(by_unit) > 1:
        one, other = list(by_unit.values())[:2]
        raise OptionError(
            f"{one.name} {_kind(one)[1]}, and {other.name} {_kind(other)[1]}: no model is measured "
            "on both",
            hint="name tasks of one kind, also for those to keep",
        )
    return next(iter(by_unit), ACCURACY)


def require_images(tasks: Iterable[Task], why: str, hint: str = "") -> None:
    """Refuse tasks that aren't of images.

    Raises:
        OptionError: naming the first such task, and why images are needed.
    """
    for task in tasks:
        unit, is_what = _kind(task)
        if unit is not ACCURACY:
            raise OptionError(f"{task.name} {is_what}, and {why}", hint=hint)


def _kind(task: Task) -> tuple[Unit, str]:
    """Return the unit of a task, and what it is in words."""
    if isinstance(task, TextTask):
        return PERPLEXITY, "is a text"
    if isinstance(task, ScoredTask):
        return SCORE, "is scored by a program"
    return ACCURACY, "has images"
