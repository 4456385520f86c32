"""The rules that choose alpha, on a curve of PAINT's authors: ViT-B/32 and MNIST."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from weightops.errors import NothingSatisfiesError, OptionError, UnknownNameError
from weightops.evaluation.units import ACCURACY
from weightops.search.goal import Goal, Point, choose, difference, nearest_first

# alpha, accuracy on MNIST, accuracy on CIFAR-10 (supported): from the authors' log, near the optima
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
    assert "1 point under the base's (89.84%)" in why


def test_an_alpha_within_the_error_of_the_bound_is_not_chosen() -> None:
    curve = [Point(0.0, 0.5, 0.9), Point(0.1, 0.7, 0.897, 0.002), Point(0.2, 0.8, 0.8915, 0.002)]
    assert choose(curve).alpha == 0.1
    assert "95 % confidence" in choose(curve).why
    assert choose([Point(p.alpha, p.score, p.kept) for p in curve]).alpha == 0.2


def test_ties_go_to_the_smaller_alpha() -> None:
    flat = [Point(a, 0.5, 0.5) for a in (1.0, 0.5, 0.0)]
    assert choose(flat).alpha == choose(flat, rule="mean").alpha == 0.0


def test_errors() -> None:
    with pytest.raises(OptionError, match="measure alpha 0"):
        choose(CURVE[1:])
    with pytest.raises(UnknownNameError, match="no rule 'best'"):
        choose(CURVE, rule="best")  # type: ignore[arg-type]
    with pytest.raises(NothingSatisfiesError, match=r"nearest is alpha 0.1 with 90.18%"):
        choose(CURVE, max_supported_drop=-0.01)


def test_difference_interval_and_worst_score() -> None:
    rng = np.random.default_rng(3)
    a, b = ({t: torch.from_numpy(rng.random(50) < 0.6) for t in "xy"} for _ in range(2))
    gap, error = difference(a, b, {"x": 0.25, "y": 0.75})
    d = {t: a[t].double().numpy() - b[t].double().numpy() for t in "xy"}
    assert gap == pytest.approx(0.25 * d["x"].mean() + 0.75 * d["y"].mean())
    assert error == pytest.approx(
        np.sqrt(0.25**2 * d["x"].var() / 50 + 0.75**2 * d["y"].var() / 50)
    )
    low, high = ACCURACY.interval(torch.arange(100) < 97)
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


def test_several_coefficients_and_one() -> None:
    one, several = Point(-0.5, 0.1, 0.2), Point((0.25, -0.5), 0.1, 0.2)
    assert (one.coefficients, one.distance) == ((-0.5,), 0.5)
    assert (several.coefficients, several.distance) == ((0.25, -0.5), 0.75)
    assert nearest_first([several, Point((0.0, 0.75), 0.0, 0.0), Point((0.0, 0.0), 0.0, 0.0)]) == [
        Point((0.0, 0.0), 0.0, 0.0),
        Point((0.0, 0.75), 0.0, 0.0),
        several,
    ]
