"""Read the values of a recipe's keys."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from weightops.algebra.names import Each, PerTensor
from weightops.errors import RecipeError
from weightops.statistics.statistic import Kind
from weightops.support.registry import unknown

EACH = "each"
"""The key of an option with one value for each model: ``{each: [0.2, 0.5]}``."""


def check_keys(content: Mapping[str, Any], known: Sequence[str], kind: str) -> None:
    """Refuse keys that aren't known."""
    for key in content:
        if key not in known:
            raise unknown(kind, str(key), known)


def read_options(content: Any) -> dict[str, Any]:
    """Return a method's options, with `Each` where a value is one for each model."""
    if not isinstance(content, dict):
        raise RecipeError("options is a mapping of the method's options to values")
    return {
        str(name): Each(value[EACH]) if isinstance(value, dict) and list(value) == [EACH] else value
        for name, value in content.items()
    }


def read_statistics(value: Any) -> dict[str, Any]:
    """Return kind -> ref of a statistic, or the arguments of `collect`.

    Raises:
        RecipeError: if it is anything else.
    """
    kinds, made = get_args(Kind), ("task", "text", "images", "split", "labels", "after")
    if not isinstance(value, dict):
        raise RecipeError("statistics is a mapping, such as {gram: ref} or {gram: {task: mnist}}")
    check_keys(value, kinds, "kind of statistic")
    for kind, given in value.items():
        if isinstance(given, dict):
            check_keys(given, made, "key of a statistic")
            if given.get("after", "merged") != "merged":
                raise RecipeError(f"after is 'merged', not {given['after']!r}")
        elif not isinstance(given, str):
            raise RecipeError(
                f"{kind} is a ref or a mapping such as {{task: mnist}}, not {given!r}"
            )
    return value


def read_layers(value: Any) -> tuple[int, int]:
    """Return a range of layers.

    Raises:
        RecipeError: if it isn't two whole numbers, the second larger.
    """
    two = isinstance(value, (list, tuple)) and len(value) == 2
    if not two or not all(type(v) is int and v >= 0 for v in value) or value[1] <= value[0]:
        raise RecipeError(f"layers are [from, to], counted from 0, without the last; not {value}")
    return value[0], value[1]


def read_numbers(value: Any, name: str) -> PerTensor:
    """Return a `PerTensor` of finite numbers.

    Raises:
        RecipeError: if it holds anything else.
    """
    if isinstance(value, dict):
        return {str(pattern): read_numbers(inner, name) for pattern, inner in value.items()}
    if isinstance(value, list) and value:
        return [read_numbers(inner, name) for inner in value]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise RecipeError(
            f"{name} is a number, a mapping of name patterns to numbers, or a list of numbers, "
            f"not {value!r}"
        )
    return float(value)
