"""Choose coefficients on validation data, under constraints, and give the reason.

A `Goal` defines which coefficients are best. The searches of `weightops.search` decide which ones
are measured, and on how many images; each search ends with `Goal.choose` among those measured on
all images.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

from weightops.errors import NothingSatisfiesError, OptionError, UnknownNameError
from weightops.evaluation.units import ACCURACY, Unit
from weightops.support.lazy import torch
from weightops.support.text import counted

Rule = Literal["patching", "mean"]
RULES: tuple[Rule, ...] = ("patching", "mean")

CONFIDENCE = 1.64
"""Standard errors of a one-sided 95 % confidence bound."""

Coefficients = tuple[float, ...]

Hits: TypeAlias = "Mapping[str, torch.Tensor]"
"""Task -> a value for each of its samples, the higher the better, shape ``(n,)``: whether an image
was classified correctly, or the mean log-likelihood of a block of text."""


@dataclass(frozen=True)
class _Edit:
    """The coefficients of an edit."""

    alpha: float | Coefficients

    @property
    def coefficients(self) -> Coefficients:
        """Return the coefficients as a tuple, also if there is only one."""
        return self.alpha if isinstance(self.alpha, tuple) else (self.alpha,)

    @property
    def distance(self) -> float:
        """Return the distance from the base, ``sum_i |alpha_i|``; 0 for the base itself."""
        return math.fsum(map(abs, self.coefficients))


@dataclass(frozen=True)
class Point(_Edit):
    """The result of an edit: its score, and the accuracy that must not get worse.

    Attributes:
        alpha: the coefficient, or the coefficients.
        score: mean value of the tasks to improve, such as accuracy in [0, 1]; times -1 if it is to
            be low.
        kept: mean value of the tasks that must not get worse.
        error: standard error of the difference between ``kept`` and the base's, on the same
            images; 0 if not known.
    """

    score: float
    kept: float
    error: float = 0.0

    @property
    def mean(self) -> float:
        """Return the mean of score and kept accuracy."""
        return (self.score + self.kept) / 2


@dataclass(frozen=True)
class Choice(_Edit):
    """The chosen coefficients, with the reason in one sentence.

    Attributes:
        alpha: the coefficient, or the coefficients.
        why: the reason.
    """

    why: str


@dataclass(frozen=True)
class Goal:
    """A definition of the best edit: the highest score among edits that keep given tasks.

    Attributes:
        score: task -> weight; the score is the weighted sum of accuracies. Negative weights ask
            for low accuracies.
        keep: task -> weight of the tasks that must not get worse; empty for no constraint.
        ratio: the kept accuracy must be at least ``ratio * base - drop``.
        drop: a fraction: 0.01 is one point.
        errors: the constraint must hold by this many standard errors of the difference: of many
            alphas, the one at the boundary has often crossed it by luck.
        worst: the score is the lowest weighted accuracy, instead of their sum.
        each: each kept task must keep its accuracy, instead of their weighted mean.
        what: the score in words.
        kept: the kept accuracy in words.
        unit: what values are.
        reference: task -> a value to subtract from its own.
    """

    score: Mapping[str, float] = field(default_factory=dict)
    keep: Mapping[str, float] = field(default_factory=dict)
    ratio: float = 1.0
    drop: float = 0.01
    errors: float = CONFIDENCE
    worst: bool = False
    each: bool = False
    what: str = "best accuracy"
    kept: str = "supported mean"
    unit: Unit = ACCURACY
    reference: Mapping[str, float] = field(default_factory=dict)

    def point(self, alpha: Coefficients, hits: Hits, base: Hits) -> Point:
        """Return the point of an edit.

        Args:
            alpha: the edit's coefficients.
            hits: hits of the edit.
            base: hits of the base on the same images.
        """
        kept, error = 0.0, 0.0
        if self.each:
            changes = [difference(hits, base, {name: 1.0}) for name in self.keep]
            kept, error = min(changes, key=lambda change: change[0] - self.errors * change[1])
        elif self.keep:
            kept = weighted(hits, self.keep)
            error = difference(hits, base, self.keep)[1]
        return Point(alpha[0] if len(alpha) == 1 else alpha, self.value(hits), kept, error)

    def value(self, hits: Hits) -> float:
        """Return the score of an edit with these hits."""
        values = self._values(hits)
        return min(values.values()) if self.worst else math.fsum(values.values())

    def _values(self, hits: Hits) -> dict[str, float]:
        """Return the weighted value of each task."""
        return {
            task: weight * (accuracy(hits[task]) - self.reference.get(task, 0.0))
            for task, weight in self.score.items()
        }

    def gain(self, a: Hits, b: Hits) -> tuple[float, float]:
        """Return the score of ``a`` minus the score of ``b``, and its standard error."""
        if not self.worst:
            return difference(a, b, self.score)
        worst = [min(values, key=lambda t: values[t]) for values in map(self._values, (a, b))]
        error = max(difference(a, b, {task: self.score[task]})[1] for task in worst)
        return self.value(a) - self.value(b), error

    def kept_error(self, a: Hits, b: Hits) -> float:
        """Return the standard error of the difference between the kept accuracies of two edits."""
        if self.each:
            return max(difference(a, b, {name: 1.0})[1] for name in self.keep)
        return difference(a, b, self.keep)[1]

    def slack(self, hits: Hits, base: Hits) -> tuple[float, float]:
        """Return the kept accuracy minus its lower bound, and the standard error.

        The difference is infinite if nothing must be kept.
        """
        if not self.keep:
            return math.inf, 0.0
        point = self.point((0.0,), hits, base)
        return point.kept - self._floor(
            0.0 if self.each else weighted(base, self.keep)
        ), point.error

    def choose(
        self, points: Iterable[Point], *, base: Point | None = None, constrained: bool | None = None
    ) -> Choice:
        """Choose the highest score among the points that satisfy the constraint.

        Of equal scores, the one nearest to the base is chosen.

        Args:
            points: the measured points.
            base: the point of the base; by default the point at 0 among ``points``.
            constrained: whether the constraint applies; by default if ``keep`` isn't empty.

        Raises:
            NothingSatisfiesError: if no point satisfies the constraint; the message has the
                nearest one.
        """
        ordered = nearest_first(points)
        kind = "alpha" if ordered and not isinstance(ordered[0].alpha, tuple) else "candidate"
        count = counted(len(ordered), kind)
        if not (bool(self.keep) if constrained is None else constrained):
            best = max(ordered, key=lambda point: point.score)
            return Choice(best.alpha, f"{self._scored(best)} of {count}")
        base = base or next((point for point in ordered if not point.distance), None)
        if base is None:
            raise OptionError(
                "the cost of an edit can't be computed without the base", hint="measure alpha 0 too"
            )
        floor = self._floor(base.kept)
        allowed = [p for p in ordered if p.kept - self.errors * p.error >= floor - 1e-9]
        if not allowed:
            raise self._unsatisfied(ordered, floor)
        best = max(allowed, key=lambda point: point.score)
        is_sure = self.errors and any(point.error for point in ordered)
        return Choice(
            best.alpha,
            f"{self._scored(best)} among the {len(allowed)} of {count} "
            f"whose {self.kept} ({self.unit.shown(best.kept)}) is "
            f"{self.unit.bound(self.ratio, self.drop)} the base's ({self.unit.shown(base.kept)})"
            f"{' with 95 % confidence' if is_sure else ''}",
        )

    def _floor(self, kept: float) -> float:
        """Return the lowest allowed accuracy, given the base's."""
        ratio = self.ratio if kept >= 0 else 2 - self.ratio  # as much of it below
        return ratio * kept - self.drop

    def _scored(self, best: Point) -> str:
        return f"{self.what} on validation data ({self._shown(best)})"

    def _shown(self, point: Point) -> str:
        """Return a point's score, also of tasks whose scores are to be low, for a sentence."""
        sign = math.copysign(1.0, min(self.score.values(), default=1.0))
        return self.unit.shown(sign * point.score)

    def _unsatisfied(self, points: Sequence[Point], floor: float) -> NothingSatisfiesError:
        nearest = max(points, key=lambda point: point.kept)
        return NothingSatisfiesError(
            f"no alpha keeps the {self.kept} at {self.unit.shown(floor)}; nearest is alpha "
            f"{shown(nearest.alpha)} with {self.unit.shown(nearest.kept)} "
            f"({self.what.split(' ', 1)[-1]} {self._shown(nearest)})"
        )


def choose(
    points: Sequence[Point], *, rule: Rule = "patching", max_supported_drop: float = 0.01
) -> Choice:
    """Choose alpha from points measured on validation data (PAINT, arXiv 2208.05592).

    Of equally good alphas, the one nearest to 0 is chosen.

    Args:
        points: one for each alpha, 0 among them: that one is the base. Their score is the patching
            accuracy, their kept accuracy the supported accuracy.
        rule: "patching" takes the best patching accuracy among the points whose supported accuracy
            is at most ``max_supported_drop`` below the base's, with 95 % confidence (1.64 standard
            errors) where the error is known. "mean" takes the best mean of patching and supported
            accuracy.
        max_supported_drop: a fraction: 0.01 is one point.

    Returns:
        The chosen alpha and the reason.

    Raises:
        NothingSatisfiesError: if no point satisfies the constraint; the message has the nearest.
        OptionError: if the rule needs the base, and no point is at 0.
        UnknownNameError: if there is no such rule.

    >>> curve = [Point(0.0, 0.48, 0.90), Point(0.5, 0.95, 0.895), Point(1.0, 0.99, 0.60)]
    >>> choose(curve).alpha, choose(curve, max_supported_drop=0.0).alpha
    (0.5, 0.0)
    """
    if rule not in RULES:
        raise UnknownNameError(f"there is no rule {rule!r}", hint=f"known: {', '.join(RULES)}")
    if rule == "mean":
        means = [replace(point, score=point.mean) for point in points]
        goal = Goal(what="best mean of patching and supported accuracy")
        return goal.choose(means, constrained=False)
    goal = Goal(drop=max_supported_drop, what="best patching accuracy")
    return goal.choose(points, constrained=True)


def nearest_first(points: Iterable[Point]) -> list[Point]:
    """Return the points, sorted by their distance from the base."""
    return sorted(points, key=lambda point: (point.distance, point.coefficients))


def shown(alpha: float | Coefficients) -> str:
    """Return coefficients in the form that messages have."""
    return " ".join(f"{a:g}" for a in (alpha if isinstance(alpha, tuple) else (alpha,)))


def accuracy(hits: torch.Tensor) -> float:
    """Return the mean value of samples, such as the share of images classified correctly."""
    return hits.double().mean().item()


def weighted(hits: Hits, weights: Mapping[str, float]) -> float:
    """Return ``sum_t w_t accuracy_t``."""
    return math.fsum(weight * accuracy(hits[task]) for task, weight in weights.items())


def difference(a: Hits, b: Hits, weights: Mapping[str, float]) -> tuple[float, float]:
    """Return the weighted accuracy of ``a`` minus that of ``b``, and its paired standard error.

    Args:
        a: hits of one edit.
        b: hits of another edit on the same images.
        weights: task -> weight.
    """
    total, variance = 0.0, 0.0
    for task, weight in weights.items():
        change = a[task].double() - b[task].double()
        total += weight * change.mean().item()
        variance += weight**2 * change.var(unbiased=False).item() / len(change)
    return total, math.sqrt(variance)
