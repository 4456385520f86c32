"""Searches of coefficients, on accuracies that are known."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch

from weightops.errors import NonfiniteError, OptionError, UnknownNameError
from weightops.search.goal import Goal
from weightops.search.measurements import Measurements, image_count
from weightops.search.racing import race
from weightops.search.strategies import ALPHAS, SearchOptions, coordinates, grid


def test_options_are_checked() -> None:
    options = SearchOptions((1, 0.5, -0.0, 0.5))  # type: ignore[arg-type]
    assert options.alphas == (0.0, 0.5, 1.0)
    assert all(isinstance(alpha, float) for alpha in options.alphas)
    assert SearchOptions().alphas == ALPHAS
    with pytest.raises(OptionError, match="must be a finite number, not nan"):
        SearchOptions((float("nan"),))
    with pytest.raises(UnknownNameError, match=r"no search strategy 'walk'(?s:.*)race, grid, cma"):
        SearchOptions(strategy="walk")  # type: ignore[arg-type]


def curve_hits(
    accuracy: dict[str, list[float]], n: int = 400
) -> dict[tuple[float, ...], dict[str, torch.Tensor]]:
    """Return hits along alpha: an image is a hit where its difficulty is below the accuracy."""
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


def recorded(
    hits: dict[tuple[float, ...], dict[str, torch.Tensor]], goal: Goal
) -> tuple[Measurements, list[int]]:
    """Return measurements that take recorded hits, and the numbers of images that they take."""
    images: list[int] = []

    def measure(alpha: tuple[float, ...], start: float, stop: float) -> dict[str, torch.Tensor]:
        asked = {
            t: h[image_count(len(h), start) : image_count(len(h), stop)]
            for t, h in hits[alpha].items()
        }
        images.append(sum(map(len, asked.values())))
        return asked

    base = next(iter(hits))
    return Measurements(measure, goal, base, {t: len(h) for t, h in hits[base].items()}), images


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
def test_race_chooses_like_grid_on_fewer_images(goal: Goal) -> None:
    hits = curve_hits(RISE)
    (full, all_images), (fast, few_images) = recorded(hits, goal), recorded(hits, goal)
    chosen, raced = grid(full, list(hits)), race(fast, list(hits))
    gap, error = goal.gain(hits[(chosen.alpha,)], hits[(raced.alpha,)])
    assert gap <= 2 * error + 1e-9
    assert sum(few_images) <= 0.3 * sum(all_images)


def test_race_takes_a_fifth_of_the_images_on_average() -> None:
    shares = []
    for drop, steepness in product((0.005, 0.02, 0.05, 0.1, 0.2), (1.0, 4.0, 12.0)):
        curves = {
            "p": list(0.5 + 0.45 * (1 - np.exp(-steepness * XS))),
            "s": list(0.9 - 0.25 * XS**2),
            "t": list(0.8 + 0.1 * XS - 0.2 * XS**2),
        }
        goal = Goal({"p": 1.0}, {"s": 0.5, "t": 0.5}, drop=drop)
        hits = curve_hits(curves, n=1000)
        (full, all_images), (fast, few_images) = recorded(hits, goal), recorded(hits, goal)
        chosen, raced = grid(full, list(hits)), race(fast, list(hits))
        gap, error = goal.gain(hits[(chosen.alpha,)], hits[(raced.alpha,)])
        assert gap <= 2 * error + 1e-9
        shares.append(sum(few_images) / sum(all_images))
    assert np.mean(shares) <= 0.2


@pytest.mark.parametrize("scale", [0.08, 0.12, 0.2])
def test_race_finds_a_peak_where_the_line_is_dense(scale: float) -> None:
    """The sum of many vectors is best at a small alpha, of a list that goes far beyond it."""
    line = np.array([0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9, 1.2, 1.5, 2, 2.5, 3])
    rise = line / scale * np.exp(1 - line / scale)
    curve = list(0.8 + 0.1 * rise - 0.2 * np.clip(line - 0.3, 0, None))
    by_place, goal = curve_hits({"p": curve}, n=1600), Goal({"p": 1.0})
    hits = {(float(a),): h for a, h in zip(line, by_place.values(), strict=True)}
    (full, _), (fast, _) = recorded(hits, goal), recorded(hits, goal)
    alphas = list(hits)[1:]
    chosen, raced = grid(full, alphas), race(fast, alphas)
    assert goal.gain(hits[(chosen.alpha,)], hits[(raced.alpha,)])[0] < 0.01


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("images", [1, 4, 15])
def test_race_of_few_images_sees_all_of_them(images: int) -> None:
    hits = curve_hits(RISE, n=images)
    for goal in (Goal({"p": 1.0}, {"s": 1.0}, drop=0.01), Goal({"s": -1.0})):
        measurements, _ = recorded(hits, goal)
        assert (race(measurements, list(hits)).alpha,) in hits
        assert set(measurements.shares.values()) == {1.0}


@pytest.mark.parametrize("count", [1, 2, 3])
def test_race_of_a_short_line(count: int) -> None:
    curve = {"t": [0.5, 0.9, 0.7]}
    hits = curve_hits(curve)
    measurements, _ = recorded(hits, Goal({"t": 1.0}))
    assert race(measurements, list(hits)[:count]).alpha == (0.0 if count == 1 else 0.5)


def test_race_is_the_same_again() -> None:
    hits = curve_hits(RISE)
    runs = [recorded(hits, Goal({"p": 1.0}, {"s": 1.0}, drop=0.03)) for _ in range(2)]
    assert len({race(measurements, list(hits)) for measurements, _ in runs}) == 1
    assert runs[0][1] == runs[1][1]


def test_coordinates_find_an_optimum_off_the_diagonal() -> None:
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
    measurements, _ = recorded(hits, Goal({"t": 1.0}))
    assert coordinates(measurements, values, [(v, v) for v in values]).alpha == optimum


@pytest.mark.parametrize("search", [grid, race])
@pytest.mark.parametrize("bad", [{1.0}, {0.5, 0.75, 1.0}])
def test_edits_whose_logits_are_not_finite_are_left_out(
    search: object, bad: set[float], caplog: pytest.LogCaptureFixture
) -> None:
    curve = {"t": [0.5, 0.6, 0.7, 0.8, 0.9]}
    hits = curve_hits(curve)
    lowest = Goal({"t": -1.0}, what="lowest accuracy")  # of which an edit without hits is the best

    def measure(alpha: tuple[float, ...], start: float, stop: float) -> dict[str, torch.Tensor]:
        if alpha[0] in bad:
            raise NonfiniteError("the logits have NaN")
        return {
            t: h[image_count(len(h), start) : image_count(len(h), stop)]
            for t, h in hits[alpha].items()
        }

    line = list(hits)
    measurements = Measurements(measure, lowest, line[0], {"t": 400})
    assert search(measurements, line).alpha == 0.0  # type: ignore[operator]
    assert "alpha 1 is left out of the search: the logits have NaN" in caplog.text
    with pytest.raises(NonfiniteError, match="NaN"):
        search(Measurements(measure, lowest, (1.0,), {"t": 400}), line)  # type: ignore[operator]
