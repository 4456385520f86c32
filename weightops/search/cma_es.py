"""Search several coefficients that depend on each other, by CMA-ES (Hansen, arXiv 1604.00772)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from weightops.search.goal import Choice, Coefficients
from weightops.search.measurements import Measurements
from weightops.search.racing import race
from weightops.support.lazy import torch

SHARE = 1 / 4
"""Share of the images on which candidates are measured."""


def evolve(
    measurements: Measurements,
    alphas: Sequence[float],
    start: Iterable[Coefficients],
    *,
    rounds: int = 12,
    seed: int = 0,
) -> Choice:
    """Choose several coefficients that depend on each other, by CMA-ES (arXiv 1604.00772).

    Candidates are drawn from a Gaussian whose mean, width and covariance follow the better half of
    them. They are clipped to the range of ``alphas``, rounded to hundredths, and measured on a
    quarter of the images. Candidates that satisfy the constraint are ordered by score; all others
    come after them, ordered by the size of the violation. The best candidates of all rounds are
    measured on all images.

    Args:
        measurements: measures the coefficients.
        alphas: their minimum and maximum are the bounds of each coefficient.
        start: coefficients among which the best one is the start, such as a shared coefficient
            with each value.
        rounds: number of rounds.
        seed: seed of the draws.
    """
    low, high = min(alphas), max(alphas)
    best = race(measurements, list(start)).coefficients
    gaussian = _Gaussian(best, 0.2 * (high - low), seed)
    fitness: dict[Coefficients, tuple[bool, float]] = {}
    for _ in range(rounds):
        points = gaussian.draw().clamp(low, high)
        candidates = [tuple(round(a, 2) + 0.0 for a in point) for point in points.tolist()]
        for alpha in candidates:
            fitness[alpha] = _fitness(measurements, alpha)
        places = range(len(candidates))
        ranking = sorted(places, key=lambda i: fitness[candidates[i]], reverse=True)
        gaussian.follow(points[ranking])
    best_first = sorted(fitness, key=lambda alpha: fitness[alpha], reverse=True)
    for alpha in best_first[: gaussian.population]:
        measurements.measure(alpha)
    return measurements.choose()


def _fitness(measurements: Measurements, alpha: Coefficients) -> tuple[bool, float]:
    """Return whether an edit satisfies the constraint, and its score, or else its margin."""
    for coefficients in (alpha, measurements.base):
        measurements.measure(coefficients, SHARE)
    if alpha in measurements.left_out:
        return False, -math.inf
    margin, _ = measurements.margin(alpha, SHARE)
    if margin < 0:
        return False, margin
    return True, measurements.goal.value(measurements.first(alpha, SHARE))


class _Gaussian:
    """The distribution of CMA-ES; comments give the paper's symbols.

    Args:
        mean: where to start.
        step_size: initial standard deviation of each coordinate.
        seed: seed of the draws.
    """

    def __init__(self, mean: Sequence[float], step_size: float, seed: int) -> None:
        n = len(mean)
        self.mean, self.step_size = torch.tensor(mean, dtype=torch.float64), step_size
        self.covariance = torch.eye(n, dtype=torch.float64)
        self.path = torch.zeros(n, dtype=torch.float64)  # p_c
        self.step_path = torch.zeros(n, dtype=torch.float64)  # p_sigma
        self.generation = 0
        self.population = 4 + int(3 * math.log(n))  # lambda
        self._generator = torch.Generator().manual_seed(seed)
        ranks = torch.arange(1, self.population // 2 + 1, dtype=torch.float64)
        weights = math.log((self.population + 1) / 2) - ranks.log()
        self.weights = weights / weights.sum()
        self.effective = mu = 1 / float(self.weights.square().sum())  # mu_eff
        # Learning rates and damping: equations 55 to 58.
        self.path_rate = (4 + mu / n) / (n + 4 + 2 * mu / n)  # c_c
        self.step_rate = (mu + 2) / (n + mu + 5)  # c_sigma
        self.rank_one_rate = 2 / ((n + 1.3) ** 2 + mu)  # c_1
        rank_mu_rate = 2 * (mu - 2 + 1 / mu) / ((n + 2) ** 2 + mu)
        self.rank_mu_rate = min(1 - self.rank_one_rate, rank_mu_rate)  # c_mu
        self.damping = 1 + 2 * max(0.0, math.sqrt((mu - 1) / (n + 1)) - 1) + self.step_rate
        self.expected_length = math.sqrt(n) * (1 - 1 / (4 * n) + 1 / (21 * n * n))  # of N(0, I)

    def draw(self) -> torch.Tensor:
        """Return random points, shape ``(population, n)``."""
        variances, self._axes = torch.linalg.eigh(self.covariance)
        self._lengths = variances.clamp(min=1e-12).sqrt()
        shape = (self.population, len(self.mean))
        normal = torch.randn(shape, generator=self._generator, dtype=torch.float64)
        moves: torch.Tensor = self.step_size * (normal * self._lengths) @ self._axes.T
        return self.mean + moves

    def follow(self, points: torch.Tensor) -> None:
        """Move towards the better half of the drawn points, which are sorted, the best first."""
        self.generation += 1
        moves = (points[: len(self.weights)] - self.mean) / self.step_size
        move = self.weights @ moves
        self.mean = self.mean + self.step_size * move
        length = self._extend_step_path(move)
        self._extend_path(move, length)
        kept = 1 - self.rank_one_rate - self.rank_mu_rate
        rank_one = self.rank_one_rate * torch.outer(self.path, self.path)
        rank_mu = self.rank_mu_rate * (moves.T * self.weights) @ moves
        self.covariance = kept * self.covariance + rank_one + rank_mu
        excess = length / self.expected_length - 1
        self.step_size *= math.exp(self.step_rate / self.damping * excess)

    def _extend_step_path(self, move: torch.Tensor) -> float:
        """Add a move, without the covariance, to the path of the step size; return its length."""
        rate = self.step_rate
        whitened = self._axes @ ((self._axes.T @ move) / self._lengths)
        scale = math.sqrt(rate * (2 - rate) * self.effective)
        self.step_path = (1 - rate) * self.step_path + scale * whitened
        return float(self.step_path.norm())

    def _extend_path(self, move: torch.Tensor, length: float) -> None:
        """Add a move to the path of the covariance, unless the step path is unusually long."""
        usual = math.sqrt(1 - (1 - self.step_rate) ** (2 * self.generation))
        limit = (1.4 + 2 / (len(self.mean) + 1)) * self.expected_length
        rate = self.path_rate
        scale = math.sqrt(rate * (2 - rate) * self.effective) if length / usual < limit else 0.0
        self.path = (1 - rate) * self.path + scale * move
