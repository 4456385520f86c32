"""The values in a recipe, each checked when it is read."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from weightops.algebra.names import Each, PerTensor
from weightops.errors import RecipeError, UnknownNameError
from weightops.merging.methods.method import Method
from weightops.merging.methods.table import METHODS
from weightops.merging.yaml_lines import at
from weightops.statistics.statistic import Kind
from weightops.support.arguments import check_arguments
from weightops.support.registry import unknown

EACH = "each"
"""The key of an option with one value for each model: ``{each: [0.2, 0.5]}``."""


def check_keys(content: Mapping[str, Any], known: Sequence[str], kind: str) -> None:
    """Check that a value is a mapping, and its keys.

    Raises:
        RecipeError: if it isn't a mapping.
        UnknownNameError: for an unknown key, with the nearest, and its line.
    """
    if not isinstance(content, dict):
        raise RecipeError(f"{content!r:.80} stands where a mapping is needed, each {kind} in it")
    for key in content:
        if key not in known:
            with at(content, key):
                raise unknown(kind, str(key), known)


def method_of(name: str) -> Method:
    """Return the merge method of a name.

    Raises:
        UnknownNameError: if there is none, with the nearest; for RegMean++, how it is written.
    """
    try:
        return METHODS[name[:200]]
    except UnknownNameError as error:
        plain = re.sub(r"[\W_]", "", name.lower().replace("+", "plus"))
        if plain != "regmeanplusplus":
            raise
        hint = "it is regmean with the statistics {gram: {task: ..., after: merged}} in a recipe"
        raise UnknownNameError(error.fact, hint=hint) from None


def statistics_of(value: Any) -> dict[str, Any]:
    """Return kind -> ref of a statistic, or the arguments of `collect`.

    Raises:
        RecipeError: if it is anything else.
        OptionError: for an argument that `collect` can't have.
    """
    if not isinstance(value, dict):
        raise RecipeError("statistics is a mapping, such as {gram: ref} or {gram: {task: mnist}}")
    check_keys(value, get_args(Kind), "kind of statistic")
    statistics = {}
    for kind, given in value.items():
        with at(value, kind):
            if not isinstance(given, (str, dict)):
                raise RecipeError(
                    f"{kind} is a ref or a mapping such as {{task: mnist}}, not {given!r:.80}"
                )
            statistics[kind] = given if isinstance(given, str) else _collected(kind, given)
    return statistics


_OF_STATISTIC = ("task", "text", "images", "split", "labels", "after")
_OF_ONE_KIND = {"after": "gram", "labels": "fisher"}


def _collected(kind: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of `collect` that make a statistic."""
    from weightops.statistics.collect import collect

    check_keys(given, _OF_STATISTIC, "key of a statistic")
    arguments = dict(given)
    if arguments.get("labels") is True:  # how YAML reads the word
        arguments["labels"] = "true"
    for key, value in arguments.items():
        with at(given, key):
            if _OF_ONE_KIND.get(key, kind) != kind:
                of = _OF_ONE_KIND[key]
                raise RecipeError(f"{key}: {value!s:.80} is for {of}, not for {kind}")
            if key in ("task", "text"):
                name_of(key, value)
            elif key != "after":
                check_arguments(collect, **{key: value})
            elif value != "merged":
                raise RecipeError(f"after is 'merged', not {value!r:.80}")
    data = [key for key in ("task", "text") if key in arguments]
    if len(data) != 1 or ("after" in arguments and data != ["task"]):
        raise RecipeError(
            f"{kind} is of one task{'' if 'after' in arguments else ', or of one text'}, and "
            f"there is {' and '.join(data) or 'none'}",
            hint=f"such as {kind}: {{task: mnist}}",
        )
    return arguments


def name_of(key: str, value: object) -> str:
    """Return the value of a key that is a name.

    Raises:
        RecipeError: if it is anything else.
    """
    if not isinstance(value, str):
        raise RecipeError(f"{key} is {value!r:.80}, and must be a name")
    return value


def options_of(content: Any) -> dict[str, Any]:
    """Return a method's options, with `Each` where a value is one for each model."""
    if not isinstance(content, dict):
        raise RecipeError("options is a mapping of the method's options to values")
    options = {str(name): _plain(value, str(name)) for name, value in content.items()}
    for name, value in options.items():
        if isinstance(value, dict) and list(value) == [EACH]:
            if not isinstance(value[EACH], list):
                raise RecipeError(f"{name} has no list of values, one for each model")
            options[name] = Each(value[EACH])
    return options


def seed_of(value: Any) -> int:
    """Return a seed.

    Raises:
        RecipeError: if it isn't a whole number of 64 bits.
    """
    if type(value) not in (int, float) or value != value or not -(2**63) <= value < 2**63:
        raise RecipeError(f"seed is {value!r:.80}, and must be a whole number of 64 bits")
    return int(value)


def flag_of(name: str, value: object) -> bool:
    """Return the value of a key that is true or false.

    Raises:
        RecipeError: if it is neither.
    """
    if not isinstance(value, bool):
        raise RecipeError(f"{name} is {value!r:.80}, and must be true or false")
    return value


def rank_of(value: Any) -> int:
    """Return the rank of an adapter.

    Raises:
        RecipeError: if it isn't a whole number above 0.
    """
    if type(value) is not int or not 0 < value < 2**31:
        raise RecipeError(f"rank is {value!r:.80}, and must be a whole number above 0")
    return value


def _plain(value: Any, name: str) -> Any:
    """Return a value with text for keys, and without numbers that no computer word holds.

    Raises:
        RecipeError: for such a number.
    """
    if isinstance(value, dict):
        return {str(key): _plain(inner, name) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner, name) for inner in value]
    if isinstance(value, int) and abs(value) >= 2**63:
        raise RecipeError(f"{name} is a number of {value.bit_length()} bits, which can't be")
    return value


def layers_of(value: Any) -> tuple[int, int]:
    """Return a range of layers.

    Raises:
        RecipeError: if it isn't two whole numbers, the second larger.
    """
    two = isinstance(value, (list, tuple)) and len(value) == 2
    if not two or not all(type(v) is int and v >= 0 for v in value) or value[1] <= value[0]:
        raise RecipeError(f"layers are [from, to], counted from 0, without the last; not {value}")
    return value[0], value[1]


def numbers_of(value: Any, name: str) -> PerTensor:
    """Return a `PerTensor` of finite numbers.

    Raises:
        RecipeError: if it holds anything else.
    """
    if isinstance(value, dict):
        return {str(pattern): numbers_of(inner, name) for pattern, inner in value.items()}
    if isinstance(value, list) and value:
        return [numbers_of(inner, name) for inner in value]
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or abs(value) > sys.float_info.max or math.isnan(value):
        raise RecipeError(
            f"{name} is a number, a mapping of name patterns to numbers, or a list of numbers, "
            f"not {value!r:.80}"
        )
    return float(value)
