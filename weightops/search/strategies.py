"""Search coefficients: decide which ones to measure, and on how many images."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from weightops.algebra.names import finite
from weightops.errors import OptionError, UnknownNameError
from weightops.search.goal import Choice, Coefficients
from weightops.search.measurements import Measurements
from weightops.search.racing import race

ALPHAS = tuple(round(0.05 * i, 2) for i in range(21))
SearchStrategy = Literal["race", "grid", "cma", "entropy", "loss"]
GRADIENT = ("entropy", "loss")
"""The strategies that follow a gradient, which only an addition has."""


@dataclass(frozen=True)
class SearchOptions:
    """Options of a search for coefficients on validation data.

    Attributes:
        alphas: Coefficients to try; 0 is always among them.
        strategy: race measures on all validation images only alphas that may still be the best;
            grid measures every alpha on all of them; cma is for several alphas that depend on each
            other. For an addition, entropy and loss follow the gradient of the predictions'
            entropy, without labels, or of the loss (see `add`).

    >>> SearchOptions((1, 0.5)).alphas
    (0.0, 0.5, 1.0)
    """

    alphas: tuple[float, ...] = ALPHAS
    strategy: SearchStrategy = "race"

    def __post_init__(self) -> None:
        alphas: object = self.alphas
        if not isinstance(alphas, Iterable) or isinstance(alphas, str):
            raise OptionError(f"alphas are several numbers, not {alphas!r}", hint="(0, 0.5, 1)")
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
