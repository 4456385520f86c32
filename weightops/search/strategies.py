"""Search coefficients: decide which ones to measure, and on how many images."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from weightops.algebra.names import finite
from weightops.errors import UnknownNameError
from weightops.search.goal import Choice, Coefficients
from weightops.search.measurements import Measurements

ALPHAS = tuple(round(0.05 * i, 2) for i in range(21))
SearchStrategy = Literal["grid", "race", "cma", "entropy", "loss"]
GRADIENT = ("entropy", "loss")
"""The strategies that follow a gradient, which only an addition has."""


@dataclass(frozen=True)
class SearchOptions:
    """Options of a search for coefficients on validation data.

    Attributes:
        alphas: Coefficients to try; 0 is always among them.
        strategy: grid measures every alpha on all validation images; race drops hopeless ones
            early, on few images; cma is for several alphas that depend on each other. For an
            addition, entropy and loss follow the gradient of the predictions' entropy, without
            labels, or of the loss (see `add`).

    >>> SearchOptions((1, 0.5)).alphas
    (0.0, 0.5, 1.0)
    """

    alphas: tuple[float, ...] = ALPHAS
    strategy: SearchStrategy = "grid"

    def __post_init__(self) -> None:
        object.__setattr__(self, "alphas", tuple(sorted({0.0, *map(finite, self.alphas)})))
        known = get_args(SearchStrategy)
        if self.strategy not in known:
            raise UnknownNameError(
                f"there is no search strategy {self.strategy!r}", hint=f"known: {', '.join(known)}"
            )


def grid(measurements: Measurements, alphas: Iterable[Coefficients]) -> Choice:
    """Measure all coefficients on all images, and choose."""
    alphas = list(alphas)
    for alpha in dict.fromkeys([*alphas, measurements.base]):
        measurements.measure(alpha)
    return measurements.choose(alphas)


class _Round(NamedTuple):
    """A round of `race`."""

    stride: int  # distance of the new alphas from the survivors; in the first round, between them
    share: float  # of the images
    survivors: int  # largest number of alphas that stay


ROUNDS = (_Round(4, 1 / 8, 4), _Round(2, 1 / 4, 3), _Round(1, 1 / 2, 4), _Round(0, 1.0, 0))

SURE = 2.0
"""Standard errors from which on `race` takes a difference as certain."""


def race(measurements: Measurements, alphas: Sequence[Coefficients]) -> Choice:
    """Choose along a line of coefficients, from coarse to fine, and drop hopeless ones early.

    Each round adds the survivors' neighbours at half the distance, and doubles the images. An alpha
    is dropped if it almost certainly violates the constraint, or if another one satisfies the
    constraint with a higher score. Differences are paired; their errors shrink with the share of
    images that is still to come. Of the other alphas, those nearest to the likeliest choice stay.
    The last ones are measured on all images.

    Args:
        measurements: measures the coefficients.
        alphas: the line, from one end to the other.
    """
    base, line = measurements.base, list(dict.fromkeys(alphas))
    alive: set[int] = set()  # places in the line
    for this in ROUNDS:
        alive |= _added(alive, len(line), this.stride)
        for alpha in (base, *(line[i] for i in sorted(alive))):
            measurements.measure(alpha, this.share)
        alive = {i for i in alive if line[i] not in measurements.left_out}
        if this.share < 1 and alive:
            alive = _survivors(measurements, line, alive, this)
    choice = measurements.choose([base, *(line[i] for i in sorted(alive))])
    lower = min(alive - {0}, default=0) - 1
    while line[0] == base and not choice.distance and lower > 0:
        # All promising alphas have failed: go back towards the base.
        alive.add(lower)
        measurements.measure(line[lower])
        choice = measurements.choose([base, *(line[i] for i in sorted(alive))])
        lower -= 1
    return choice


def _added(alive: set[int], size: int, stride: int) -> set[int]:
    """Return the survivors' neighbours, or a coarse grid before there are survivors."""
    if not alive:
        return {*range(0, size, stride), size - 1}
    return {i + step for i in alive for step in (-stride, stride)} & set(range(size))


def _survivors(
    measurements: Measurements, line: Sequence[Coefficients], alive: set[int], this: _Round
) -> set[int]:
    """Return the places in the line that may still be chosen when all images are measured."""
    goal, error_to_come = measurements.goal, SURE * math.sqrt(1 - this.share)
    # Another race may have measured more images of some alphas.
    hits = {i: measurements.first(line[i], this.share) for i in alive}
    margins, uncertainties = {}, {}
    for i in alive:
        margins[i], error = measurements.margin(line[i], this.share)
        uncertainties[i] = error_to_come * error
    hopeful = {i for i in alive if margins[i] + uncertainties[i] >= 0}
    likely = [i for i in alive if margins[i] >= 0]
    if not likely:
        return set(sorted(hopeful or alive, key=lambda i: -margins[i])[: this.survivors])
    best = max(likely, key=lambda i: goal.value(hits[i]))
    certain = [i for i in alive if margins[i] - uncertainties[i] >= 0]
    leader = max(certain, key=lambda i: goal.value(hits[i]), default=None)

    def is_beaten(i: int) -> bool:
        if leader is None:
            return False
        behind, error = goal.gain(hits[leader], hits[i])
        return behind > max(error_to_come * error, 0.0)

    unbeaten = [i for i in hopeful if not is_beaten(i)]
    return set(sorted(unbeaten, key=lambda i: (abs(i - best), i))[: this.survivors])


def coordinates(
    measurements: Measurements,
    alphas: Sequence[float],
    start: Iterable[Coefficients],
    *,
    sweeps: int = 2,
) -> Choice:
    """Choose several coefficients, each in turn, until none changes.

    Args:
        measurements: measures the coefficients.
        alphas: values to try for each coefficient.
        start: coefficients among which the best one is the start, such as a shared coefficient
            with each value.
        sweeps: largest number of searches for each coefficient.
    """
    best = race(measurements, list(start)).coefficients
    for _ in range(sweeps):
        before = best
        for place in range(len(measurements.base)):
            race(measurements, [(*best[:place], a, *best[place + 1 :]) for a in alphas])
            best = measurements.choose().coefficients
        if best == before:
            break
    return measurements.choose()
