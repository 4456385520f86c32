"""Search coefficients: decide which ones to measure, and on how many images."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from weightops.algebra.names import finite
from weightops.errors import UnknownNameError
from weightops.search.goal import Choice, Coefficients
from weightops.search.measurements import Measurements

ALPHAS = tuple(round(0.05 * i, 2) for i in range(21))
SearchStrategy = Literal["grid", "race", "cma"]


@dataclass(frozen=True)
class SearchOptions:
    """How coefficients are searched on validation data.

    Attributes:
        alphas: Coefficients to try; 0 is always among them.
        strategy: grid measures every alpha on all validation images; race drops hopeless ones early,
            on few images; cma is for several alphas that depend on each other.

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


ROUNDS = ((4, 1 / 8, 4), (2, 1 / 4, 3), (1, 1 / 2, 4), (0, 1.0, 0))
"""Of `race`: distance of the new alphas to the survivors (in the first round, to each other), share of images, most survivors."""


SURE = 2.0
"""Standard errors at which `race` takes a difference for settled."""


def race(measurements: Measurements, alphas: Sequence[Coefficients]) -> Choice:
    """Choose along a line of coefficients, coarse to fine, dropping what is hopeless early.

    Each round looks at the survivors' neighbours at half the distance, on twice the images. An alpha is dropped if it is
    settled that it will not satisfy the constraint, or that another will and has a higher score; differences are
    paired, and shrink with the share of images that is still to come. Of the others those nearest to the likeliest
    choice stay; the last are measured in full.
    """
    line = list(dict.fromkeys(alphas))
    alive: set[int] = set()
    for number, (stride, share, most) in enumerate(ROUNDS):
        near = {i + step for i in alive for step in (-stride, stride)} & set(range(len(line)))
        alive |= near if number else {*range(0, len(line), stride), len(line) - 1}
        for alpha in (measurements.base, *(line[i] for i in sorted(alive))):
            measurements.measure(alpha, share)
        if share < 1:
            alive = _survivors(measurements, line, alive, share, most)
    choice = measurements.choose([measurements.base, *(line[i] for i in sorted(alive))])
    while (
        line[0] == measurements.base
        and not choice.size
        and (lower := min(alive - {0}, default=0) - 1) > 0
    ):
        alive.add(lower)  # all that looked promising have failed: back towards the base
        measurements.measure(line[lower])
        choice = measurements.choose([measurements.base, *(line[i] for i in sorted(alive))])
    return choice


def _survivors(
    measurements: Measurements,
    line: Sequence[Coefficients],
    alive: set[int],
    share: float,
    most: int,
) -> set[int]:
    """Those that may still be chosen when all images are counted."""
    goal, left = measurements.goal, math.sqrt(1 - share)
    hits = {
        i: measurements.first(line[i], share) for i in alive
    }  # some have been measured on more in another race
    base = measurements.first(measurements.base, share)
    margins, unsure = {}, {}
    for i in alive:
        slack, error = goal.slack(hits[i], base)
        margins[i] = slack - goal.errors * error * math.sqrt(
            share
        )  # the error will be as much smaller on all images
        unsure[i] = SURE * left * error
    hopeful = {i for i in alive if margins[i] + unsure[i] >= 0}
    likely = [i for i in alive if margins[i] >= 0]
    if not likely:
        return set(sorted(hopeful or alive, key=lambda i: -margins[i])[:most])
    best = max(likely, key=lambda i: goal.value(hits[i]))
    certain = [i for i in alive if margins[i] - unsure[i] >= 0]
    leader = max(certain, key=lambda i: goal.value(hits[i]), default=None)

    def beaten(i: int) -> bool:
        if leader is None:
            return False
        behind, error = goal.gain(hits[leader], hits[i])
        return behind > max(SURE * left * error, 0.0)

    kept = [i for i in hopeful if not beaten(i)]
    return set(sorted(kept, key=lambda i: (abs(i - best), i))[:most])


def coordinates(
    measurements: Measurements,
    alphas: Sequence[float],
    start: Iterable[Coefficients],
    *,
    sweeps: int = 2,
) -> Choice:
    """Choose several coefficients: the best of ``start``, then each in turn along ``alphas``, until none changes.

    Args:
        measurements: what measures.
        alphas: the values of each coefficient.
        start: where to begin, such as one shared coefficient at every value.
        sweeps: how often each coefficient is looked at, at most.
    """
    best = race(measurements, list(start)).alpha
    tried: list[Coefficients] = []
    for _ in range(sweeps):
        before = best
        for place in range(len(measurements.base)):
            here = best if isinstance(best, tuple) else (best,)
            line = [(*here[:place], alpha, *here[place + 1 :]) for alpha in alphas]
            race(measurements, line)
            tried += [here, *line]
            best = measurements.choose().alpha
        if best == before:
            break
    return measurements.choose()
