"""Choose coefficients on held-out data, under constraints, and say why.

A `Goal` says what is wanted. `grid`, `race`, `coordinates` and `evolve` decide which coefficients are measured on how many images;
all of them end with `Goal.choose` on what was measured in full.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from weightops.errors import UnknownNameError, WeightopsError

Rule = Literal["patching", "mean"]
RULES: tuple[Rule, ...] = ("patching", "mean")
CONFIDENCE = 1.64
"""Standard errors that one-sided 95 % confidence takes."""

Coefficients = tuple[float, ...]
Hits = Mapping[str, torch.Tensor]
"""Task -> for each of its images whether it was named rightly, shape ``(n,)``, boolean."""
Measure = Callable[[Coefficients, float, float], Hits]
"""Hits of given coefficients on the images between two fractions of every task's validation split."""


class NothingSatisfiesError(WeightopsError):
    """No coefficient satisfies the constraint; the message says which comes nearest."""


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
        return min(w * accuracy(hits[t]) for t, w in self.score.items()) if self.worst else weighted(hits, self.score)

    def gain(self, a: Hits, b: Hits) -> tuple[float, float]:
        """The difference of two scores, and its standard error."""
        if not self.worst:
            return difference(a, b, self.score)
        worst = [min(self.score, key=lambda t: self.score[t] * accuracy(hits[t])) for hits in (a, b)]
        error = max(difference(a, b, {task: self.score[task]})[1] for task in worst)
        return self.value(a) - self.value(b), error

    def slack(self, hits: Hits, base: Hits) -> tuple[float, float]:
        """By how much the constraint is satisfied, and the standard error of that; infinite where there is none."""
        if not self.keep:
            return math.inf, 0.0
        point = self.point((0.0,), hits, base)
        floor = -self.drop if self.each else self.ratio * weighted(base, self.keep) - self.drop
        return point.kept - floor, point.error

    def choose(self, points: Iterable[Point], *, base: Point | None = None, constrained: bool | None = None) -> Choice:
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
            return Choice(best.alpha, f"{self.what} on validation data ({abs(best.score):.2%}) of {many}")
        base = base or next((point for point in ordered if not point.size[0]), None)
        if base is None:
            raise WeightopsError("the base is needed to tell what an edit costs: measure alpha 0 too")
        floor = self.ratio * base.kept - self.drop
        allowed = [point for point in ordered if point.kept - self.errors * point.error >= floor - 1e-9]
        if not allowed:
            near = max(ordered, key=lambda point: point.kept)
            raise NothingSatisfiesError(
                f"no alpha keeps the {self.kept} at {floor:.2%}; nearest is alpha {shown(near.alpha)} with {near.kept:.2%} "
                f"({self.what.split(' ', 1)[-1]} {abs(near.score):.2%})"
            )
        best = max(allowed, key=lambda point: point.score)
        limit = (
            f"at least {100 * self.ratio:g} % of" if self.ratio != 1 else f"at most {100 * self.drop:g} points under"
        )
        sure = " with 95 % confidence" if self.errors and any(point.error for point in ordered) else ""
        return Choice(
            best.alpha,
            f"{self.what} on validation data ({abs(best.score):.2%}) among the {len(allowed)} of {many} whose {self.kept} "
            f"({best.kept:.2%}) is {limit} the base's ({base.kept:.2%}){sure}",
        )


def choose(points: Sequence[Point], *, rule: Rule = "patching", max_supported_drop: float = 0.01) -> Choice:
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
        return goal.choose([replace(point, score=point.mean) for point in points], constrained=False)
    return Goal(drop=max_supported_drop, what="best patching accuracy").choose(points, constrained=True)


def shown(alpha: float | Coefficients) -> str:
    """Coefficients for a message."""
    return " ".join(f"{a:g}" for a in (alpha if isinstance(alpha, tuple) else (alpha,)))


# ------------------------------------------------------------------ numbers


def accuracy(hits: torch.Tensor) -> float:
    """The share of hits."""
    return hits.double().mean().item()


def weighted(hits: Hits, weights: Mapping[str, float]) -> float:
    """A weighted sum of accuracies."""
    return math.fsum(weight * accuracy(hits[task]) for task, weight in weights.items())


def difference(a: Hits, b: Hits, weights: Mapping[str, float], *, prior: float = 0.0) -> tuple[float, float]:
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
        variance += weight**2 * (change.var(unbiased=False).item() + prior / len(change)) / len(change)
    return total, math.sqrt(variance)


def interval(hits: torch.Tensor) -> tuple[float, float]:
    """Wilson's 95 % confidence interval of an accuracy."""
    n, p, z = len(hits), accuracy(hits), 1.96
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)


def cut(size: int, share: float) -> int:
    """How many of ``size`` images a share of them is."""
    return round(size * share)


# ------------------------------------------------------------------ search


class Sheet:
    """What has been measured so far: for each coefficients, hits on a growing part of the images.

    Args:
        measure: measures.
        goal: what is wanted.
        base: the coefficients of the base.
        sizes: task -> number of its images.
    """

    def __init__(self, measure: Measure, goal: Goal, base: Coefficients, sizes: Mapping[str, int]) -> None:
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
        return {task: hits[: cut(self.sizes[task], share)] for task, hits in self.hits[alpha].items()}

    def points(self, among: Iterable[Coefficients] | None = None) -> list[Point]:
        """The points of what has been measured in full."""
        full = [a for a in (self.hits if among is None else among) if self.share.get(a) == 1.0]
        return [self.goal.point(alpha, self.hits[alpha], self.hits[self.base]) for alpha in full]

    def choose(self, among: Iterable[Coefficients] | None = None) -> Choice:
        """The goal's choice among what has been measured in full."""
        [base] = self.points([self.base])
        return self.goal.choose(self.points(among), base=base)


def grid(sheet: Sheet, alphas: Iterable[Coefficients]) -> Choice:
    """Measure all coefficients on all images, and choose."""
    alphas = list(alphas)
    for alpha in dict.fromkeys([*alphas, sheet.base]):
        sheet.see(alpha)
    return sheet.choose(alphas)


ROUNDS = ((4, 1 / 8, 4), (2, 1 / 4, 3), (1, 1 / 2, 4), (0, 1.0, 0))
"""Of `race`: distance of the new alphas to the survivors (in the first round, to each other), share of images, most survivors."""
SURE = 2.0
"""Standard errors at which `race` takes a difference for settled."""


def race(sheet: Sheet, alphas: Sequence[Coefficients]) -> Choice:
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
    while line[0] == sheet.base and not choice.size and (lower := min(alive - {0}, default=0) - 1) > 0:
        alive.add(lower)  # all that looked promising have failed: back towards the base
        sheet.see(line[lower])
        choice = sheet.choose([sheet.base, *(line[i] for i in sorted(alive))])
    return choice


def _survivors(sheet: Sheet, line: Sequence[Coefficients], alive: set[int], share: float, most: int) -> set[int]:
    """Those that may still be chosen when all images are counted."""
    goal, left = sheet.goal, math.sqrt(1 - share)
    hits = {i: sheet.first(line[i], share) for i in alive}  # some have been measured on more in another race
    base = sheet.first(sheet.base, share)
    margins, unsure = {}, {}
    for i in alive:
        slack, error = goal.slack(hits[i], base)
        margins[i] = slack - goal.errors * error * math.sqrt(share)  # the error will be as much smaller on all images
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


def coordinates(sheet: Sheet, alphas: Sequence[float], start: Iterable[Coefficients], *, sweeps: int = 2) -> Choice:
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
    sheet: Sheet, alphas: Sequence[float], start: Iterable[Coefficients], *, rounds: int = 12, seed: int = 0
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
        shares = math.log((self.size + 1) / 2) - torch.arange(1, self.size // 2 + 1, dtype=torch.float64).log()
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
        self.path_of_step = (1 - rate) * self.path_of_step + math.sqrt(rate * (2 - rate) * e) * straight
        length = float(self.path_of_step.norm())
        short = length / math.sqrt(1 - (1 - rate) ** (2 * self.turn)) < (1.4 + 2 / (n + 1)) * self.usual
        reach = short * math.sqrt(self.rate_path * (2 - self.rate_path) * e)
        self.path = (1 - self.rate_path) * self.path + reach * move
        kept = (1 - self.rate_one - self.rate_all) * self.covariance + self.rate_one * torch.outer(self.path, self.path)
        self.covariance = kept + self.rate_all * (moves.T * self.shares) @ moves
        self.step *= math.exp(rate / self.damping * (length / self.usual - 1))


def _worth(sheet: Sheet, alpha: Coefficients, share: float) -> tuple[bool, float]:
    """Whether coefficients satisfy the constraint on a share of the images, and their score, or by how much they don't."""
    for coefficients in (alpha, sheet.base):
        sheet.see(coefficients, share)
    hits, base = sheet.first(alpha, share), sheet.first(sheet.base, share)
    slack, error = sheet.goal.slack(hits, base)
    margin = slack - sheet.goal.errors * error * math.sqrt(share)  # as in `race`
    return margin >= 0, sheet.goal.value(hits) if margin >= 0 else margin
