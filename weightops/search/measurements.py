"""Keep the measurements of a search: hits of each edit on a growing share of the images."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping

from weightops.errors import NonfiniteError
from weightops.search.goal import Choice, Coefficients, Goal, Hits, Point, shown
from weightops.support.lazy import torch

log = logging.getLogger("weightops")

Measure = Callable[[Coefficients, float, float], Hits]
"""Return the hits of coefficients on the images between two fractions of every validation split."""


def image_count(size: int, share: float) -> int:
    """Return the number of images in a share of ``size`` images."""
    return round(size * share)


class Measurements:
    """Hits of each choice of coefficients that a search has looked at.

    Args:
        measure: measures an edit on images that it hasn't been measured on.
        goal: what the search looks for.
        base: the coefficients of the base.
        sizes: task -> number of its images.
        whole: measure all images at once, as parts of them would cost as much.

    Attributes:
        hits: coefficients -> hits on all images that they have been measured on.
        shares: coefficients -> share of the images that they have been measured on.
        left_out: coefficients whose logits aren't finite; they are never chosen.
    """

    def __init__(
        self,
        measure: Measure,
        goal: Goal,
        base: Coefficients,
        sizes: Mapping[str, int],
        *,
        whole: bool = False,
    ) -> None:
        self.goal, self.base, self.sizes = goal, base, sizes
        self.hits: dict[Coefficients, Hits] = {}
        self.shares: dict[Coefficients, float] = {}
        self.left_out: set[Coefficients] = set()
        self._measure, self._whole = measure, whole

    def measure(self, alpha: Coefficients, share: float = 1.0) -> Hits:
        """Measure coefficients on at least this share of the images; return all of their hits.

        Those whose logits aren't finite hit nothing, and are left out with a warning.

        Raises:
            NonfiniteError: if the base's logits aren't finite.
        """
        done, share = self.shares.get(alpha, 0.0), 1.0 if self._whole else share
        if share > done:
            try:
                new = self._measure(alpha, done, share)
            except NonfiniteError as error:
                if alpha == self.base:
                    raise
                log.warning("alpha %s is left out of the search: %s", shown(alpha), error.fact)
                self.left_out.add(alpha)
                share = 1.0
                new = {
                    task: torch.zeros(size - image_count(size, done), dtype=torch.bool)
                    for task, size in self.sizes.items()
                }
            old = self.hits.get(alpha)
            self.hits[alpha] = {t: torch.cat([old[t], new[t]]) for t in new} if old else new
            self.shares[alpha] = share
        return self.hits[alpha]

    def first(self, alpha: Coefficients, share: float) -> Hits:
        """Return the hits on this share of the images, though more may have been measured."""
        return {
            task: hits[: image_count(self.sizes[task], share)]
            for task, hits in self.hits[alpha].items()
        }

    def margin(self, alpha: Coefficients, share: float) -> tuple[float, float]:
        """Return the slack on this share of the images, minus its uncertainty on all images.

        The second value is the standard error on this share; the error on all images will be
        smaller by a factor of ``sqrt(share)``.
        """
        slack, error = self.goal.slack(self.first(alpha, share), self.first(self.base, share))
        return slack - self.goal.errors * error * math.sqrt(share), error

    def points(self, among: Iterable[Coefficients] | None = None) -> list[Point]:
        """Return the points of the coefficients that were measured on all images."""
        among = self.hits if among is None else among
        among = [alpha for alpha in among if alpha not in self.left_out]
        full = [alpha for alpha in among if self.shares.get(alpha) == 1.0]
        return [self.goal.point(alpha, self.hits[alpha], self.hits[self.base]) for alpha in full]

    def choose(self, among: Iterable[Coefficients] | None = None) -> Choice:
        """Return the goal's choice among the coefficients that were measured on all images."""
        (base,) = self.points([self.base])
        return self.goal.choose(self.points(among), base=base)
