"""The rules that choose alpha, on the curve that PAINT's authors published (ViT-B/32, MNIST, CIFAR-10 supported)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from weightops import Point, choose
from weightops.errors import NothingSatisfiesError, UnknownNameError, WeightopsError
from weightops.search.cma_es import evolve
from weightops.search.goal import Goal, difference, interval
from weightops.search.measurements import Measurements, image_count
from weightops.search.strategies import coordinates, grid, race

# alpha, MNIST, CIFAR-10: points of the authors' log around the optima
CURVE = [
    Point(a, p, s)
    for a, p, s in [
        (0.0, 0.4838, 0.8984),
        (0.1, 0.7553, 0.9018),
        (0.2, 0.9207, 0.8992),
        (0.21, 0.9279, 0.8986),
        (0.22, 0.9354, 0.8981),
        (0.27, 0.9615, 0.8904),
        (0.28, 0.9649, 0.8890),
        (0.29, 0.9684, 0.8866),
        (0.3, 0.9716, 0.8854),
        (0.32, 0.9771, 0.8825),
        (0.33, 0.9798, 0.8809),
        (0.34, 0.9806, 0.8800),
        (0.35, 0.9824, 0.8777),
        (0.4, 0.9881, 0.8669),
        (0.5, 0.9936, 0.8360),
        (0.7, 0.9963, 0.7191),
        (1.0, 0.9960, 0.4136),
    ]
]


def test_rules_on_the_authors_curve() -> None:
    assert choose(CURVE, rule="mean").alpha == 0.33
    assert choose(CURVE, max_supported_drop=0.0).alpha == 0.21
    assert choose(CURVE, max_supported_drop=0.01).alpha == 0.28
    assert choose(CURVE, max_supported_drop=0.02).alpha == 0.34
    assert choose(CURVE, max_supported_drop=1.0).alpha == 0.7
    why = choose(CURVE).why
    assert "96.49%" in why
    assert "1 points under the base's (89.84%)" in why


def test_what_may_be_luck_is_not_taken() -> None:
    curve = [Point(0.0, 0.5, 0.9), Point(0.1, 0.7, 0.897, 0.002), Point(0.2, 0.8, 0.8915, 0.002)]
    assert choose(curve).alpha == 0.1
    assert "95 % confidence" in choose(curve).why
    assert choose([Point(p.alpha, p.score, p.kept) for p in curve]).alpha == 0.2


def test_ties_go_to_the_smaller_alpha() -> None:
    flat = [Point(a, 0.5, 0.5) for a in (1.0, 0.5, 0.0)]
    assert choose(flat).alpha == choose(flat, rule="mean").alpha == 0.0


def test_what_cannot_be_chosen() -> None:
    with pytest.raises(WeightopsError, match="measure alpha 0"):
        choose(CURVE[1:])
    with pytest.raises(UnknownNameError, match="no rule 'best'"):
        choose(CURVE, rule="best")  # type: ignore[arg-type]
    with pytest.raises(NothingSatisfiesError, match=r"nearest is alpha 0.1 with 90.18%"):
        choose(CURVE, max_supported_drop=-0.01)


# ------------------------------------------------------------------ hits


def curve_hits(
    accuracy: dict[str, list[float]], n: int = 400
) -> dict[tuple[float, ...], dict[str, torch.Tensor]]:
    """Hits along alpha, coupled between neighbours: an image is named rightly where its difficulty is below the accuracy."""
    rng = np.random.default_rng(0)
    difficulty = {
        task: torch.from_numpy(rng.permutation((np.arange(n) + 0.5) / n)) for task in accuracy
    }
    steps = len(next(iter(accuracy.values())))
    return {
        (round(i / (steps - 1), 4),): {
            task: difficulty[task] < values[i] for task, values in accuracy.items()
        }
        for i in range(steps)
    }


def sheet_of(
    hits: dict[tuple[float, ...], dict[str, torch.Tensor]], goal: Goal
) -> tuple[Measurements, list[int]]:
    passes = [0]

    def measure(alpha: tuple[float, ...], start: float, stop: float) -> dict[str, torch.Tensor]:
        part = {
            t: h[image_count(len(h), start) : image_count(len(h), stop)]
            for t, h in hits[alpha].items()
        }
        passes[0] += sum(map(len, part.values()))
        return part

    first = next(iter(hits))
    return Measurements(measure, goal, first, {t: len(h) for t, h in hits[first].items()}), passes


XS = np.linspace(0, 1, 21)
RISE = {"p": list(0.5 + 0.45 * (1 - np.exp(-4 * XS))), "s": list(0.9 - 0.25 * XS**2)}


@pytest.mark.parametrize(
    "goal",
    [
        Goal({"p": 1.0}, {"s": 1.0}, drop=0.01),
        Goal({"p": 1.0}, {"s": 1.0}, drop=0.1),
        Goal({"p": 0.5, "s": 0.5}),
        Goal({"p": 1.0}),
        Goal({"s": -1.0}, {"p": 1.0}, ratio=0.95, drop=0.0, errors=0.0),
        Goal({"p": 1.0, "s": 1.2}, worst=True),
        Goal({"p": 1.0}, {"s": 1.0}, drop=0.03, each=True),
    ],
)
def test_race_chooses_what_the_grid_does_for_less(goal: Goal) -> None:
    hits = curve_hits(RISE)
    (full, all_passes), (fast, few_passes) = sheet_of(hits, goal), sheet_of(hits, goal)
    chosen, raced = grid(full, list(hits)), race(fast, list(hits))
    gap, error = goal.gain(hits[(chosen.alpha,)], hits[(raced.alpha,)])
    assert gap <= 2 * error + 1e-9
    assert few_passes[0] <= 0.4 * all_passes[0]


def test_coordinates_finds_what_no_shared_coefficient_gives() -> None:
    values = [0.0, 0.25, 0.5, 0.75, 1.0]
    optimum = (0.25, 1.0)
    hits = {
        (a, b): {
            "t": torch.arange(400)
            < 400 * (0.9 - (a - optimum[0]) ** 2 - 0.3 * (b - optimum[1]) ** 2)
        }
        for a in values
        for b in values
    }
    hits = {
        alpha: {"t": row["t"][torch.from_numpy(np.random.default_rng(1).permutation(400))]}
        for alpha, row in hits.items()
    }
    sheet, _ = sheet_of(hits, Goal({"t": 1.0}))
    assert coordinates(sheet, values, [(v, v) for v in values]).alpha == optimum


def test_evolution_along_a_ridge() -> None:
    """Two coefficients must change together, and a third costs what is kept: coordinate by coordinate is slow here."""
    n = 2000
    luck = torch.rand(2, n, generator=torch.Generator().manual_seed(0))
    seen: list[float] = []

    def measure(alpha: tuple[float, ...], start: float, stop: float) -> dict[str, torch.Tensor]:
        a, b, c = alpha
        score = 0.95 - 0.1 * (a + b - 1.4) ** 2 - 1.5 * (a - b - 0.4) ** 2 - 0.2 * (c - 0.6) ** 2
        kept = 0.9 - 0.2 * max(c - 0.3, 0.0)
        seen.append(stop - start)
        part = slice(image_count(n, start), image_count(n, stop))
        return {"t": luck[0, part] < score, "k": luck[1, part] < kept}

    def found() -> tuple[tuple[float, ...], str]:
        sheet = Measurements(
            measure, Goal({"t": 1.0}, {"k": 1.0}), (0.0, 0.0, 0.0), {"t": n, "k": n}
        )
        choice = evolve(sheet, [0.0, 1.0], [(v, v, v) for v in (0.0, 0.25, 0.5, 0.75, 1.0)])
        assert isinstance(choice.alpha, tuple)
        return choice.alpha, choice.why

    alpha, why = found()
    assert alpha == pytest.approx((0.9, 0.5, 0.3), abs=0.12)
    assert "95 % confidence" in why
    assert sum(seen) < 45  # passes over all images; the grid of 21 has 9,261
    assert found() == (alpha, why)


def test_numbers_against_their_formulas() -> None:
    rng = np.random.default_rng(3)
    a, b = ({t: torch.from_numpy(rng.random(50) < 0.6) for t in "xy"} for _ in range(2))
    gap, error = difference(a, b, {"x": 0.25, "y": 0.75})
    d = {t: a[t].double().numpy() - b[t].double().numpy() for t in "xy"}
    assert gap == pytest.approx(0.25 * d["x"].mean() + 0.75 * d["y"].mean())
    assert error == pytest.approx(
        np.sqrt(0.25**2 * d["x"].var() / 50 + 0.75**2 * d["y"].var() / 50)
    )
    low, high = interval(torch.arange(100) < 97)
    assert (low, high) == (pytest.approx(0.9155, abs=1e-4), pytest.approx(0.9897, abs=1e-4))
    worst = Goal({"x": 1.0, "y": 2.0}, worst=True)
    assert worst.value(a) == min(a["x"].double().mean(), 2 * a["y"].double().mean())


def test_each_task_must_be_kept() -> None:
    hits = {t: torch.arange(100) < n for t, n in (("p", 90), ("s", 95), ("u", 80))}
    base = {t: torch.arange(100) < n for t, n in (("p", 50), ("s", 90), ("u", 85))}
    mean, each = (
        Goal({"p": 1.0}, {"s": 0.5, "u": 0.5}, drop=0.02, errors=0.0, each=each)
        for each in (False, True)
    )
    assert mean.slack(hits, base)[0] == pytest.approx(0.02)
    assert each.slack(hits, base)[0] == pytest.approx(-0.03)
    points = [each.point((0.0,), base, base), each.point((1.0,), hits, base)]
    assert each.choose(points).alpha == 0.0
