"""Search several coefficients that depend on each other, by CMA-ES."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch

from weightops.search.goal import Choice, Coefficients
from weightops.search.measurements import Measurements
from weightops.search.strategies import race


def evolve(
    measurements: Measurements,
    alphas: Sequence[float],
    start: Iterable[Coefficients],
    *,
    rounds: int = 12,
    seed: int = 0,
) -> Choice:
    """Choose several coefficients that depend on each other, by CMA-ES (Hansen, arXiv 1604.00772), from the best of ``start``.

    Candidates are drawn from a Gaussian whose mean, width and covariance follow the better half; they are clipped to the range of ``alphas``,
    rounded to hundredths, and seen on a quarter of the images. Of what satisfies the constraint more is better; what doesn't is
    worse, the more it lacks. The best of all rounds are measured in full.

    Args:
        measurements: what measures.
        alphas: their least and largest bound each coefficient.
        start: where to begin, such as one shared coefficient at every value.
        rounds: how many.
        seed: of the draws.
    """
    best = race(measurements, list(start)).alpha
    low, high = min(alphas), max(alphas)
    cloud = _Gaussian(best if isinstance(best, tuple) else (best,), 0.2 * (high - low), seed)
    worth: dict[Coefficients, tuple[bool, float]] = {}
    for _ in range(rounds):
        points = cloud.draw().clamp(low, high)
        seen = [tuple(round(value, 2) + 0.0 for value in point) for point in points.tolist()]
        for alpha in seen:
            worth[alpha] = _worth(measurements, alpha, 1 / 4)
        cloud.follow(points[sorted(range(len(seen)), key=lambda i: worth[seen[i]], reverse=True)])
    for alpha in sorted(worth, key=lambda a: worth[a], reverse=True)[: cloud.size]:
        measurements.measure(alpha)
    return measurements.choose()


class _Gaussian:
    """What CMA-ES draws from: a mean, a step and a covariance that follow what was best."""

    def __init__(self, mean: Sequence[float], step: float, seed: int) -> None:
        n = len(mean)
        self.mean, self.step = torch.tensor(mean, dtype=torch.float64), step
        self.covariance = torch.eye(n, dtype=torch.float64)
        self.path, self.path_of_step = torch.zeros(2, n, dtype=torch.float64)
        self.turn, self.size = 0, 4 + int(3 * math.log(n))
        self._drawn = torch.Generator().manual_seed(seed)
        shares = (
            math.log((self.size + 1) / 2)
            - torch.arange(1, self.size // 2 + 1, dtype=torch.float64).log()
        )
        self.shares = shares / shares.sum()
        self.effective = e = 1 / float(self.shares.square().sum())
        # the rates at which paths and covariance are learnt, and the step is damped: equations 55 to 58
        self.rate_path, self.rate_step = (4 + e / n) / (n + 4 + 2 * e / n), (e + 2) / (n + e + 5)
        self.rate_one = 2 / ((n + 1.3) ** 2 + e)
        self.rate_all = min(1 - self.rate_one, 2 * (e - 2 + 1 / e) / ((n + 2) ** 2 + e))
        self.damping = 1 + 2 * max(0.0, math.sqrt((e - 1) / (n + 1)) - 1) + self.rate_step
        self.usual = math.sqrt(n) * (1 - 1 / (4 * n) + 1 / (21 * n * n))

    def draw(self) -> torch.Tensor:
        """Points, shape ``(size, n)``."""
        squares, self._axes = torch.linalg.eigh(self.covariance)
        self._lengths = squares.clamp(min=1e-12).sqrt()
        normal = torch.randn(self.size, len(self.mean), generator=self._drawn, dtype=torch.float64)
        points: torch.Tensor = self.mean + self.step * (normal * self._lengths) @ self._axes.T
        return points

    def follow(self, points: torch.Tensor) -> None:
        """Move towards the first half of the points that were drawn, the best first."""
        n, e, rate = len(self.mean), self.effective, self.rate_step
        self.turn += 1
        moves = (points[: len(self.shares)] - self.mean) / self.step
        move = self.shares @ moves
        self.mean = self.mean + self.step * move
        straight = self._axes @ ((self._axes.T @ move) / self._lengths)
        self.path_of_step = (1 - rate) * self.path_of_step + math.sqrt(
            rate * (2 - rate) * e
        ) * straight
        length = float(self.path_of_step.norm())
        short = (
            length / math.sqrt(1 - (1 - rate) ** (2 * self.turn)) < (1.4 + 2 / (n + 1)) * self.usual
        )
        reach = short * math.sqrt(self.rate_path * (2 - self.rate_path) * e)
        self.path = (1 - self.rate_path) * self.path + reach * move
        kept = (1 - self.rate_one - self.rate_all) * self.covariance + self.rate_one * torch.outer(
            self.path, self.path
        )
        self.covariance = kept + self.rate_all * (moves.T * self.shares) @ moves
        self.step *= math.exp(rate / self.damping * (length / self.usual - 1))


def _worth(measurements: Measurements, alpha: Coefficients, share: float) -> tuple[bool, float]:
    """Whether coefficients satisfy the constraint on a share of the images, and their score, or by how much they don't."""
    for coefficients in (alpha, measurements.base):
        measurements.measure(coefficients, share)
    hits, base = measurements.first(alpha, share), measurements.first(measurements.base, share)
    slack, error = measurements.goal.slack(hits, base)
    margin = slack - measurements.goal.errors * error * math.sqrt(share)  # as in `race`
    return margin >= 0, measurements.goal.value(hits) if margin >= 0 else margin
