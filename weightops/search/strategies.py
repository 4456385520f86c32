"""TODO."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch

from weightops.search.goal import Choice, Coefficients, Goal, Hits, Point

Measure = Callable[[Coefficients, float, float], Hits]
"""Hits of given coefficients on the images between two fractions of every task's validation split."""


def cut(size: int, share: float) -> int:
    """How many of ``size`` images a share of them is."""
    return round(size * share)


class Measurements:
    """What has been measured so far: for each coefficients, hits on a growing part of the images.

    Args:
        measure: measures.
        goal: what is wanted.
        base: the coefficients of the base.
        sizes: task -> number of its images.
    """

    def __init__(
        self, measure: Measure, goal: Goal, base: Coefficients, sizes: Mapping[str, int]
    ) -> None:
        self.measure, self.goal, self.base, self.sizes = measure, goal, base, sizes
        self.hits: dict[Coefficients, Hits] = {}
        self.share: dict[Coefficients, float] = {}

    def see(self, alpha: Coefficients, share: float = 1.0) -> Hits:
        """Measure on this share of the images, as far as it hasn't been done."""
        have = self.share.get(alpha, 0.0)
        if share > have:
            new = self.measure(alpha, have, share)
            old = self.hits.get(alpha)
            self.hits[alpha] = {t: torch.cat([old[t], new[t]]) for t in new} if old else new
            self.share[alpha] = share
        return self.hits[alpha]

    def first(self, alpha: Coefficients, share: float) -> Hits:
        """The hits on this share of the images, though more may have been measured."""
        return {
            task: hits[: cut(self.sizes[task], share)] for task, hits in self.hits[alpha].items()
        }

    def points(self, among: Iterable[Coefficients] | None = None) -> list[Point]:
        """The points of what has been measured in full."""
        full = [a for a in (self.hits if among is None else among) if self.share.get(a) == 1.0]
        return [self.goal.point(alpha, self.hits[alpha], self.hits[self.base]) for alpha in full]

    def choose(self, among: Iterable[Coefficients] | None = None) -> Choice:
        """The goal's choice among what has been measured in full."""
        [base] = self.points([self.base])
        return self.goal.choose(self.points(among), base=base)


def grid(sheet: Measurements, alphas: Iterable[Coefficients]) -> Choice:
    """Measure all coefficients on all images, and choose."""
    alphas = list(alphas)
    for alpha in dict.fromkeys([*alphas, sheet.base]):
        sheet.see(alpha)
    return sheet.choose(alphas)


ROUNDS = ((4, 1 / 8, 4), (2, 1 / 4, 3), (1, 1 / 2, 4), (0, 1.0, 0))
"""Of `race`: distance of the new alphas to the survivors (in the first round, to each other), share of images, most survivors."""


SURE = 2.0
"""Standard errors at which `race` takes a difference for settled."""


def race(sheet: Measurements, alphas: Sequence[Coefficients]) -> Choice:
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
        for alpha in (sheet.base, *(line[i] for i in sorted(alive))):
            sheet.see(alpha, share)
        if share < 1:
            alive = _survivors(sheet, line, alive, share, most)
    choice = sheet.choose([sheet.base, *(line[i] for i in sorted(alive))])
    while (
        line[0] == sheet.base and not choice.size and (lower := min(alive - {0}, default=0) - 1) > 0
    ):
        alive.add(lower)  # all that looked promising have failed: back towards the base
        sheet.see(line[lower])
        choice = sheet.choose([sheet.base, *(line[i] for i in sorted(alive))])
    return choice


def _survivors(
    sheet: Measurements, line: Sequence[Coefficients], alive: set[int], share: float, most: int
) -> set[int]:
    """Those that may still be chosen when all images are counted."""
    goal, left = sheet.goal, math.sqrt(1 - share)
    hits = {
        i: sheet.first(line[i], share) for i in alive
    }  # some have been measured on more in another race
    base = sheet.first(sheet.base, share)
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
    sheet: Measurements, alphas: Sequence[float], start: Iterable[Coefficients], *, sweeps: int = 2
) -> Choice:
    """Choose several coefficients: the best of ``start``, then each in turn along ``alphas``, until none changes.

    Args:
        sheet: what measures.
        alphas: the values of each coefficient.
        start: where to begin, such as one shared coefficient at every value.
        sweeps: how often each coefficient is looked at, at most.
    """
    best = race(sheet, list(start)).alpha
    tried: list[Coefficients] = []
    for _ in range(sweeps):
        before = best
        for place in range(len(sheet.base)):
            here = best if isinstance(best, tuple) else (best,)
            line = [(*here[:place], alpha, *here[place + 1 :]) for alpha in alphas]
            race(sheet, line)
            tried += [here, *line]
            best = sheet.choose().alpha
        if best == before:
            break
    return sheet.choose()


def evolve(
    sheet: Measurements,
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
        sheet: what measures.
        alphas: their least and largest bound each coefficient.
        start: where to begin, such as one shared coefficient at every value.
        rounds: how many.
        seed: of the draws.
    """
    best = race(sheet, list(start)).alpha
    low, high = min(alphas), max(alphas)
    cloud = _Gaussian(best if isinstance(best, tuple) else (best,), 0.2 * (high - low), seed)
    worth: dict[Coefficients, tuple[bool, float]] = {}
    for _ in range(rounds):
        points = cloud.draw().clamp(low, high)
        seen = [tuple(round(value, 2) + 0.0 for value in point) for point in points.tolist()]
        for alpha in seen:
            worth[alpha] = _worth(sheet, alpha, 1 / 4)
        cloud.follow(points[sorted(range(len(seen)), key=lambda i: worth[seen[i]], reverse=True)])
    for alpha in sorted(worth, key=lambda a: worth[a], reverse=True)[: cloud.size]:
        sheet.see(alpha)
    return sheet.choose()


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


def _worth(sheet: Measurements, alpha: Coefficients, share: float) -> tuple[bool, float]:
    """Whether coefficients satisfy the constraint on a share of the images, and their score, or by how much they don't."""
    for coefficients in (alpha, sheet.base):
        sheet.see(coefficients, share)
    hits, base = sheet.first(alpha, share), sheet.first(sheet.base, share)
    slack, error = sheet.goal.slack(hits, base)
    margin = slack - sheet.goal.errors * error * math.sqrt(share)  # as in `race`
    return margin >= 0, sheet.goal.value(hits) if margin >= 0 else margin
