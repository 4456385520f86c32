"""Choose coefficients from measured points, on held-out data, and say why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from weightops.errors import UnknownNameError, WeightopsError

Rule = Literal["patching", "mean"]
CONFIDENCE = 1.64
"""Standard errors that one-sided 95 % confidence takes."""

RULES: tuple[Rule, ...] = ("patching", "mean")


class NothingSatisfiesError(WeightopsError):
    """No coefficient satisfies the constraint; the message says which comes nearest."""


@dataclass(frozen=True)
class Point:
    """Accuracies in [0, 1] at one coefficient: on the patching task, and the mean over supported tasks.

    ``error`` is the standard error of the difference of the latter from the base's, on the same images; 0 if not known.
    """

    alpha: float
    patching: float
    supported: float
    error: float = 0.0

    @property
    def mean(self) -> float:
        """Mean of patching accuracy and mean supported accuracy."""
        return (self.patching + self.supported) / 2


@dataclass(frozen=True)
class Choice:
    """A coefficient and the reason for it, in one sentence."""

    alpha: float
    why: str


def choose(points: Sequence[Point], *, rule: Rule = "patching", max_supported_drop: float = 0.01) -> Choice:
    """Choose alpha from points measured on validation data (arXiv 2208.05592). Ties go to the alpha nearer to 0.

    Args:
        points: one for each alpha; the one at 0 is the base.
        rule: "patching": the best patching accuracy among the points whose supported accuracy is at most
            ``max_supported_drop`` below the base's, with 95 % confidence (1.64 standard errors) where the error is known:
            of many alphas the one at the limit has often passed it by luck. "mean": the best mean of patching and
            supported accuracy.
        max_supported_drop: as a fraction: 0.01 is one point.

    Raises:
        NothingSatisfiesError: if no point satisfies the constraint, with the one that comes nearest.

    >>> curve = [Point(0.0, 0.48, 0.90), Point(0.5, 0.95, 0.895), Point(1.0, 0.99, 0.60)]
    >>> choose(curve).alpha, choose(curve, max_supported_drop=0.0).alpha
    (0.5, 0.0)
    """
    points = sorted(points, key=lambda point: (abs(point.alpha), point.alpha))
    if rule == "mean":
        best = max(points, key=lambda point: point.mean)
        return Choice(
            best.alpha,
            f"best mean of patching and supported validation accuracy ({best.mean:.2%}) of {len(points)} alphas",
        )
    if rule != "patching":
        raise UnknownNameError(f"there is no rule {rule!r}; known: {', '.join(RULES)}")
    base = next((point for point in points if point.alpha == 0), None)
    if base is None:
        raise WeightopsError("the base is needed to tell what a patch costs: measure alpha 0 too")
    floor = base.supported - max_supported_drop
    allowed = [point for point in points if point.supported - CONFIDENCE * point.error >= floor - 1e-9]
    if not allowed:
        near = max(points, key=lambda point: point.supported)
        raise NothingSatisfiesError(
            f"no alpha keeps supported accuracy at {floor:.2%}; nearest is alpha {near.alpha:g} with {near.supported:.2%} "
            f"(patching {near.patching:.2%})"
        )
    best = max(allowed, key=lambda point: point.patching)
    return Choice(
        best.alpha,
        f"best patching accuracy on validation data ({best.patching:.2%}) among the {len(allowed)} of {len(points)} alphas whose "
        f"supported mean ({best.supported:.2%}) is at most {100 * max_supported_drop:g} points under the base's ({base.supported:.2%})"
        + (" with 95 % confidence" if any(point.error for point in points) else ""),
    )
