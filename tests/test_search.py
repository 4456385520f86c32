"""The rules that choose alpha, on the curve that PAINT's authors published (ViT-B/32, MNIST, CIFAR-10 supported)."""

from __future__ import annotations

import pytest

from weightops import Point, choose
from weightops.errors import UnknownNameError, WeightopsError
from weightops.search import NothingSatisfiesError

# alpha, MNIST, CIFAR-10: points of the authors' log around the optima
CURVE = [
    Point(a, p, s)
    for a, p, s in [
        (0.0, 0.4838, 0.8984), (0.1, 0.7553, 0.9018), (0.2, 0.9207, 0.8992), (0.21, 0.9279, 0.8986), (0.22, 0.9354, 0.8981),
        (0.27, 0.9615, 0.8904), (0.28, 0.9649, 0.8890), (0.29, 0.9684, 0.8866), (0.3, 0.9716, 0.8854), (0.32, 0.9771, 0.8825),
        (0.33, 0.9798, 0.8809), (0.34, 0.9806, 0.8800), (0.35, 0.9824, 0.8777), (0.4, 0.9881, 0.8669),
        (0.5, 0.9936, 0.8360), (0.7, 0.9963, 0.7191), (1.0, 0.9960, 0.4136),
    ]
]  # fmt: skip


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
