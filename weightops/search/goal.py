"""Choose coefficients on held-out data, under constraints, and say why.

A `Goal` says what is wanted. `grid`, `race`, `coordinates` and `evolve` decide which coefficients are measured on how many images;
all of them end with `Goal.choose` on what was measured in full.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from weightops.errors import NothingSatisfiesError, OptionError, UnknownNameError

Rule = Literal["patching", "mean"]


RULES: tuple[Rule, ...] = ("patching", "mean")


CONFIDENCE = 1.64
"""Standard errors that one-sided 95 % confidence takes."""


Coefficients = tuple[float, ...]


Hits = Mapping[str, torch.Tensor]
"""Task -> for each of its images whether it was named rightly, shape ``(n,)``, boolean."""


@dataclass(frozen=True)
class Point:
    """What one choice of coefficients gives, in [0, 1]: what is to be improved, and what must not get worse.

    Attributes:
        alpha: the coefficient, or the coefficients.
        score: of the tasks to improve; negative where the least accuracy is wanted.
        kept: of the tasks that must not get worse.
        error: standard error of the difference of ``kept`` from the base's, on the same images; 0 if not known.
    """

    alpha: float | Coefficients
    score: float
    kept: float
    error: float = 0.0

    @property
    def mean(self) -> float:
        """Mean of both."""
        return (self.score + self.kept) / 2

    @property
    def size(self) -> tuple[float, ...]:
        """How far from the base: what ties are broken by."""
        alphas = self.alpha if isinstance(self.alpha, tuple) else (self.alpha,)
        return math.fsum(map(abs, alphas)), *alphas


@dataclass(frozen=True)
class Choice:
    """A coefficient (or several) and the reason for it, in one sentence."""

    alpha: float | Coefficients
    why: str

    @property
    def size(self) -> float:
        """How far from the base; 0 for the base itself."""
        return math.fsum(map(abs, self.alpha if isinstance(self.alpha, tuple) else (self.alpha,)))


@dataclass(frozen=True)
class Goal:
    """What coefficients are chosen for: the highest score among those that keep what must be kept.

    Attributes:
        score: task -> weight; the weighted sum of accuracies is to be high. Negative weights make it low.
        keep: task -> weight of what must not get worse; empty if nothing has to be kept.
        ratio: the kept accuracy must be at least ``ratio * base - drop``.
        drop: as a fraction: 0.01 is one point.
        errors: by how many standard errors of the difference it must be so: of many alphas the one at the limit
            has often passed it by luck.
        worst: the score is the lowest weighted accuracy, instead of their sum.
        each: every kept task must be kept, instead of their weighted mean.
        what: the score in words.
        kept: what is kept, in words.
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

    def point(self, alpha: Coefficients, hits: Hits, base: Hits) -> Point:
        """The point of measured coefficients."""
        kept, error = 0.0, 0.0
        if self.each:
            changes = [difference(hits, base, {name: 1.0}) for name in self.keep]
            kept, error = min(changes, key=lambda change: change[0] - self.errors * change[1])
        elif self.keep:
            kept = weighted(hits, self.keep)
            error = difference(hits, base, self.keep)[1]
        return Point(alpha[0] if len(alpha) == 1 else alpha, self.value(hits), kept, error)

    def value(self, hits: Hits) -> float:
        """The score of hits."""
        return (
            min(w * accuracy(hits[t]) for t, w in self.score.items())
            if self.worst
            else weighted(hits, self.score)
        )

    def gain(self, a: Hits, b: Hits) -> tuple[float, float]:
        """The difference of two scores, and its standard error."""
        if not self.worst:
            return difference(a, b, self.score)
        worst = [
            min(self.score, key=lambda t: self.score[t] * accuracy(hits[t])) for hits in (a, b)
        ]
        error = max(difference(a, b, {task: self.score[task]})[1] for task in worst)
        return self.value(a) - self.value(b), error

    def slack(self, hits: Hits, base: Hits) -> tuple[float, float]:
        """By how much the constraint is satisfied, and the standard error of that; infinite where there is none."""
        if not self.keep:
            return math.inf, 0.0
        point = self.point((0.0,), hits, base)
        floor = -self.drop if self.each else self.ratio * weighted(base, self.keep) - self.drop
        return point.kept - floor, point.error

    def choose(
        self, points: Iterable[Point], *, base: Point | None = None, constrained: bool | None = None
    ) -> Choice:
        """The best of the points that keep what must be kept; ties go to the one nearer to the base.

        Args:
            points: what has been measured.
            base: what it is kept against; the point at 0 unless it is given.
            constrained: whether anything must be kept; by default if the goal says what.

        Raises:
            NothingSatisfiesError: if none does, with the one that comes nearest.
        """
        ordered = sorted(points, key=lambda point: point.size)
        constrained = bool(self.keep) if constrained is None else constrained
        many = f"{len(ordered)} {'alphas' if ordered and not isinstance(ordered[0].alpha, tuple) else 'candidates'}"
        if not constrained:
            best = max(ordered, key=lambda point: point.score)
            return Choice(
                best.alpha, f"{self.what} on validation data ({abs(best.score):.2%}) of {many}"
            )
        base = base or next((point for point in ordered if not point.size[0]), None)
        if base is None:
            raise OptionError("the base is needed to tell what an edit costs: measure alpha 0 too")
        floor = self.ratio * base.kept - self.drop
        allowed = [
            point for point in ordered if point.kept - self.errors * point.error >= floor - 1e-9
        ]
        if not allowed:
            near = max(ordered, key=lambda point: point.kept)
            raise NothingSatisfiesError(
                f"no alpha keeps the {self.kept} at {floor:.2%}; nearest is alpha {shown(near.alpha)} with {near.kept:.2%} "
                f"({self.what.split(' ', 1)[-1]} {abs(near.score):.2%})"
            )
        best = max(allowed, key=lambda point: point.score)
        limit = (
            f"at least {100 * self.ratio:g} % of"
            if self.ratio != 1
            else f"at most {100 * self.drop:g} points under"
        )
        sure = (
            " with 95 % confidence" if self.errors and any(point.error for point in ordered) else ""
        )
        return Choice(
            best.alpha,
            f"{self.what} on validation data ({abs(best.score):.2%}) among the {len(allowed)} of {many} whose {self.kept} "
            f"({best.kept:.2%}) is {limit} the base's ({base.kept:.2%}){sure}",
        )


def choose(
    points: Sequence[Point], *, rule: Rule = "patching", max_supported_drop: float = 0.01
) -> Choice:
    """Choose alpha from points measured on validation data (arXiv 2208.05592). Ties go to the alpha nearer to 0.

    Args:
        points: one for each alpha; the one at 0 is the base. The score is patching accuracy, what is kept supported accuracy.
        rule: "patching": the best patching accuracy among the points whose supported accuracy is at most
            ``max_supported_drop`` below the base's, with 95 % confidence (1.64 standard errors) where the error is known.
            "mean": the best mean of patching and supported accuracy.
        max_supported_drop: as a fraction: 0.01 is one point.

    Raises:
        NothingSatisfiesError: if no point satisfies the constraint, with the one that comes nearest.

    >>> curve = [Point(0.0, 0.48, 0.90), Point(0.5, 0.95, 0.895), Point(1.0, 0.99, 0.60)]
    >>> choose(curve).alpha, choose(curve, max_supported_drop=0.0).alpha
    (0.5, 0.0)
    """
    if rule not in RULES:
        raise UnknownNameError(f"there is no rule {rule!r}; known: {', '.join(RULES)}")
    if rule == "mean":
        goal = Goal(what="best mean of patching and supported accuracy")
        return goal.choose(
            [replace(point, score=point.mean) for point in points], constrained=False
        )
    return Goal(drop=max_supported_drop, what="best patching accuracy").choose(
        points, constrained=True
    )


def shown(alpha: float | Coefficients) -> str:
    """Coefficients for a message."""
    return " ".join(f"{a:g}" for a in (alpha if isinstance(alpha, tuple) else (alpha,)))


def accuracy(hits: torch.Tensor) -> float:
    """The share of hits."""
    return hits.double().mean().item()


def weighted(hits: Hits, weights: Mapping[str, float]) -> float:
    """A weighted sum of accuracies."""
    return math.fsum(weight * accuracy(hits[task]) for task, weight in weights.items())


def difference(
    a: Hits, b: Hits, weights: Mapping[str, float], *, prior: float = 0.0
) -> tuple[float, float]:
    """The difference of two weighted accuracies on the same images, and its standard error, from pairs.

    Args:
        a: hits.
        b: hits on the same images.
        weights: task -> weight.
        prior: images of each task that are taken to differ beside those that do, for few images.
    """
    total, variance = 0.0, 0.0
    for task, weight in weights.items():
        change = a[task].double() - b[task].double()
        total += weight * change.mean().item()
        variance += (
            weight**2 * (change.var(unbiased=False).item() + prior / len(change)) / len(change)
        )
    return total, math.sqrt(variance)


def interval(hits: torch.Tensor) -> tuple[float, float]:
    """Wilson's 95 % confidence interval of an accuracy."""
    n, p, z = len(hits), accuracy(hits), 1.96
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)
