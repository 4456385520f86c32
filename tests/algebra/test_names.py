"""Values by tensor name."""

from __future__ import annotations

import math

import pytest

from weightops.algebra.names import Each, NameRules, check_per_tensor, depths, escape, value_at
from weightops.errors import OptionError, UnknownNameError

ODD_NAMES = ["a[0].w", "a0.w", "b*", "bc", "d?", "de", "[!x]", "A0.w"]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_an_escaped_name_matches_only_itself(name: str) -> None:
    rules = NameRules.of({escape(name): 2.0})
    assert [n for n in ODD_NAMES if rules(n)] == [name]
    assert [n for n in ODD_NAMES if NameRules.exactly([name])(n)] == [name]


def test_the_first_pattern_that_matches_counts() -> None:
    assert NameRules.of({"a.*": 1.0, "*": 2.0})("a.b") == 1.0
    assert NameRules.of({"*": 2.0, "a.*": 1.0})("a.b") == 2.0
    assert NameRules(items=(("a", 1.0), ("a", 2.0)))("a") == 1.0
    assert NameRules.of({"a": 1.0})("A") == 0.0


def test_patterns_that_match_nothing_are_refused() -> None:
    names = ["layers.0.w", "layers.1.w"]
    NameRules.of({"layers.*": 1.0}).check(names)
    with pytest.raises(UnknownNameError, match=r"no tensor that matches 'layer\.0\.w'"):
        NameRules.of({"layers.*": 1.0, "layer.0.w": 1.0}).check(names)
    with pytest.raises(UnknownNameError, match=r"no tensor that matches 'head\.\*'"):
        check_per_tensor(Each([1.0, {"head.*": 1.0, "*": 2.0}]), names, "density")
    check_per_tensor({"*": 1.0}, [], "density")


@pytest.mark.parametrize("value", [[], ["a"], [0.1, math.nan], [math.inf], [[1.0]], [None]])
def test_lists_over_the_depth_hold_finite_numbers(value: list[object]) -> None:
    with pytest.raises(OptionError, match="density over the depth of the layers is a list of numb"):
        check_per_tensor({"*": value}, ["w"], "density")


def test_values_over_the_depth_are_interpolated() -> None:
    values = [0.0, 1.0, 4.0]
    assert [value_at(values, "w", d, None) for d in (0, 0.25, 0.5, 0.75, 1)] == [0, 0.5, 1, 2.5, 4]
    assert value_at([3.0], "w", 0.7, None) == 3.0
    assert value_at({"a": 1.0}, "b", 0.5, "default") == "default"
    assert value_at(Each([1.0, [0.0, 1.0]]), "w", 0.5, None) == Each([1.0, 0.5])


def test_depths_of_several_towers() -> None:
    names = ["text.1.w", "text.3.w", "visual.0.w", "visual.1.w", "visual.4.w", "one.7.w", "proj"]
    assert list(depths(names).values()) == [0, 1, 0, 0.25, 1, 1, 1]
