"""Race: choose along a line of coefficients, and measure only what may still be the best."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from weightops.search.goal import Choice, Coefficients, Hits
from weightops.search.measurements import Measurements

Array = npt.NDArray[np.float64]

FIRST_SHARE, FEWEST = 1 / 8, 16
"""The share of the images that the first look takes, and the fewest of a task."""
FIRST_PLACES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""The places of the first look, as fractions of the line."""
NOISE = 1.0
"""Standard errors of the difference that a better score doesn't count by."""
WORTH = 0.4
"""The expected gain from which on an alpha is measured, over the noise between neighbours."""
SLOPE, BEND, REACH = 0.5, 0.2, 0.5
"""What curves are expected: how steep, how bent, and over which fraction of the line."""
UNSEEN = 0.5
"""Images by which any two places are taken to differ, on top of those that are seen to."""


def race(measurements: Measurements, alphas: Sequence[Coefficients]) -> Choice:
    """Choose along a line of coefficients, and measure only what may still be the best.

    All images are measured at the base, and an eighth of them at five places. Smooth curves through
    what is known predict score and constraint everywhere, with an uncertainty that grows with the
    number of images which change from place to place (kriging). The alpha with the highest expected
    improvement over the best one yet (Jones, Schonlau and Welch 1998), times the probability that
    it satisfies the constraint, is measured on all images next. It ends when no improvement is
    expected that stands out from the noise of the images.

    Args:
        measurements: measures the coefficients.
        alphas: the line, from one end to the other.
    """
    line = list(dict.fromkeys(alphas))
    measurements.measure(measurements.base)
    share = min(1.0, max(FIRST_SHARE, FEWEST / min(measurements.sizes.values())))
    for fraction in FIRST_PLACES:
        measurements.measure(line[round(fraction * (len(line) - 1))], share)
    state = _Line(measurements, line)
    if not state.full:
        measurements.measure(line[0])
    while (promising := state.most_promising()) is not None:
        measurements.measure(line[promising])
    return measurements.choose([measurements.base, *(line[i] for i in state.full)])


class _Curve(NamedTuple):
    """A quantity along the line.

    Attributes:
        known: place -> its value, where it has been measured, on some images at least.
        mean: its expected value at each place.
        error: the standard error of that.
        walk: the variance of the difference, on all images, between the first place and each.
    """

    known: dict[int, float]
    mean: Array
    error: Array
    walk: Array


class _Line:
    """A line of coefficients, and all that is known along it."""

    def __init__(self, measurements: Measurements, line: Sequence[Coefficients]) -> None:
        self._measurements, self._line = measurements, line
        # By place, not by size: who lists 0.1, 0.2, 1 and 3 expects most to happen before 1.
        self._x = np.linspace(0, 1, len(line))

    @property
    def _seen(self) -> list[int]:
        """The places that were measured, on some images at least."""
        shares, bad = self._measurements.shares, self._measurements.left_out
        return [i for i, alpha in enumerate(self._line) if alpha in shares and alpha not in bad]

    @property
    def full(self) -> list[int]:
        """The places that were measured on all images."""
        return [i for i in self._seen if self._share(i) == 1]

    def _share(self, place: int) -> float:
        return self._measurements.shares[self._line[place]]

    def most_promising(self) -> int | None:
        """Return the place to measure next, or None if no gain is expected that is worth it."""
        full, bad = self.full, self._measurements.left_out
        waiting = [i for i, a in enumerate(self._line) if i not in full and a not in bad]
        if not waiting:
            return None
        goal, base = self._measurements.goal, self._measurements.base
        hits = [self._measurements.hits[self._line[i]] for i in full]
        values = dict(zip(full, map(goal.value, hits), strict=True))
        score = self._curve(
            lambda i, share: goal.value(self._measurements.first(self._line[i], share)),
            lambda a, b: goal.gain(a, b)[1],
            goal.score,
        )
        possible = np.ones(len(self._line))
        if goal.keep:
            margin = self._curve(
                lambda i, share: self._measurements.margin(self._line[i], share)[0],
                goal.kept_error,
                dict.fromkeys(goal.keep, 1.0) if goal.each else goal.keep,
            )
            possible = _below(margin.mean / margin.error)
            full = [i for i in full if margin.known[i] >= -1e-9]
        leader = max(full, key=lambda i: (values[i], -i), default=0)
        best = max(goal.value(self._measurements.hits[base]), values.get(leader, -math.inf))
        noise = np.sqrt(np.abs(score.walk - score.walk[leader]))
        gain = score.mean - best - NOISE * noise
        z = gain / score.error
        expected = possible * (gain * _below(z) + score.error * _density(z))
        worth = expected / np.sqrt(np.gradient(score.walk))
        first = max(waiting, key=lambda i: (worth[i], -i))
        only_base = all(self._line[i] == base for i in self.full)
        return first if worth[first] >= WORTH or only_base else None

    def _curve(
        self,
        value: Callable[[int, float], float],
        error: Callable[[Hits, Hits], float],
        weights: Mapping[str, float],
    ) -> _Curve:
        """Predict a quantity at all places.

        Args:
            value: gives the quantity of a place on a share of the images.
            error: gives the standard error of a difference.
            weights: task -> its weight in the quantity.
        """
        seen, full = self._seen, self.full
        sizes = self._measurements.sizes
        image = max(abs(weight) / sizes[task] for task, weight in weights.items())
        walk = self._walk(error, UNSEEN * image**2)
        known, variances = {}, []
        for i in seen:
            # What is known of few images is told by the difference to a place known on all.
            share, other = self._share(i), min(full, key=lambda j: (abs(j - i), j))
            known[i] = value(other, 1.0) + value(i, share) - value(other, share)
            variances.append(abs(walk[i] - walk[other]) * (1 - share) / share)
        x = self._x[:, None] - self._x[None]
        trend = SLOPE**2 * (1 + np.outer(self._x, self._x))
        bends = BEND**2 * np.exp(-(x**2) / (2 * REACH**2))
        prior = trend + bends + walk[-1] - np.abs(walk[:, None] - walk[None])
        between = prior[:, seen]
        weighted = np.linalg.solve(prior[np.ix_(seen, seen)] + np.diag(variances), between.T).T
        mean = weighted @ np.array([known[i] for i in seen])
        left = np.diag(prior) - (weighted * between).sum(1)
        return _Curve(known, mean, np.sqrt(np.maximum(left, 1e-14)), walk)

    def _walk(self, error: Callable[[Hits, Hits], float], least: float) -> Array:
        """Return the variance of the difference between the first place and each, on all images.

        It is a sum over steps; those between two places that are known share their variance.
        """
        steps = np.full(len(self._line) - 1, np.nan)
        seen, first = self._seen, self._measurements.first
        for i, j in pairwise(seen):
            share = min(self._share(i), self._share(j))
            change = error(first(self._line[i], share), first(self._line[j], share))
            steps[i:j] = (change**2 * share + least / share) / (j - i)
        beyond = np.nanmean(steps) if len(seen) > 1 else least
        return np.concatenate([[0.0], np.cumsum(np.where(np.isnan(steps), beyond, steps))])


def _below(z: Array) -> Array:
    """Return the probability that a standard normal variable is below each number."""
    return np.array([0.5 * math.erfc(-value / math.sqrt(2)) for value in z])


def _density(z: Array) -> Array:
    """Return the density of a standard normal variable."""
    return np.exp(-np.square(z) / 2) / math.sqrt(2 * math.pi)
