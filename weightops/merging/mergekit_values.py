"""Translate the values in mergekit's YAML, which may depend on the tensor, into `PerTensor`."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from weightops.algebra.names import PerTensor, escape
from weightops.errors import RecipeError

_NUMBER = re.compile(r"(?<![^.])(?:layers?|h|blocks?)\.(\d+)(\.|$)")
"""The number of a layer in a filter, and the dot behind it."""
_YES = ("true", "1", "yes", "on", "y", "t")
_NO = ("false", "0", "no", "off", "n", "f")


def number(value: Any, name: str) -> float:
    """Return a number, which mergekit reads from text, such as 1e-5, and truth values, too.

    Raises:
        RecipeError: if it is none, or isn't finite.
    """
    with suppress(TypeError, ValueError, OverflowError):
        found = float(value)
        if math.isfinite(found):
            return found
    raise RecipeError(f"{name} is {value!r:.80}, and must be a finite number")


def whole(value: Any, name: str) -> int:
    """Return a whole number, which mergekit reads from text, 16.0 and truth values, too.

    Raises:
        RecipeError: if it is none.
    """
    found = number(value, name)
    if not found.is_integer():
        raise RecipeError(f"{name} is {value!r:.80}, and must be a whole number")
    return int(found)


def flag(value: Any, name: str) -> bool:
    """Return a truth value, which mergekit reads from 0, 1 and words such as "no", too.

    Raises:
        RecipeError: if it is none.
    """
    word = str(int(value) if isinstance(value, float) and value in (0, 1) else value).lower()
    if word in _YES or word in _NO:
        return word in _YES
    raise RecipeError(f"{name} is {value!r:.80}, and must be true or false")


def scoped(*scopes: Any, read: Callable[[Any], Any]) -> PerTensor:
    """Return the value of the innermost scope; where its filters don't match, of the next one.

    A value is the same for all tensors; a gradient over the layers, whose first value is that of
    the tensors outside of them; or conditional, ``{filter: text, value: ...}``.

    Args:
        scopes: the settings in mergekit's YAML, the innermost first, some of them None or empty.
        read: function of one value that returns it in the parameter's type.
    """
    values: dict[str, PerTensor] = {}
    for scope in scopes:
        if scope in (None, []):
            continue
        listed = [scope] if isinstance(scope, dict) else scope
        if not (isinstance(listed, list) and isinstance(listed[0], dict)):
            listed = [{"value": scope}]
        for condition in listed:
            text = condition.get("filter")
            pattern = "*" if text in (None, "*", "") else f"*{escape(text)}*"
            values.setdefault(pattern, _over_layers(condition["value"], read))
        if "*" in values:
            break
    return values["*"] if list(values) == ["*"] else values or None


def _over_layers(value: Any, read: Callable[[Any], Any]) -> PerTensor:
    """Translate a value, or a gradient over the layers."""
    if not isinstance(value, list):
        return read(value)
    read_values = [read(item) for item in value]
    same = all(item == read_values[0] for item in read_values)
    return read_values[0] if same else {"lines": read_values}


def mapped(value: PerTensor, change: Callable[[Any], Any]) -> PerTensor:
    """Return what a function makes of each value in a `PerTensor`."""
    if isinstance(value, Mapping):
        return {key: mapped(inner, change) for key, inner in value.items()}
    if isinstance(value, list):
        return [mapped(inner, change) for inner in value]
    return change(value)


def renumbered(setting: Any, shift: int, layers: range) -> Any:
    """Return a setting whose filters have other numbers of layers, where they have any.

    A number at the end of a filter is the beginning of others, too: 1 of 10.

    Args:
        setting: a value, a gradient or conditional values.
        shift: what is added to a number.
        layers: the numbers that there are.

    >>> renumbered([{"filter": "layers.3.mlp", "value": 0.5}], 2, range(4))
    [{'filter': 'layers.5.mlp', 'value': 0.5}]
    >>> renumbered({"filter": "layers.1", "value": 0.5}, 2, range(8, 12))
    [{'filter': 'layers.12.', 'value': 0.5}, {'filter': 'layers.13.', 'value': 0.5}]
    """
    if isinstance(setting, dict):
        text = str(setting.get("filter") or "")
        found = _NUMBER.search(text)
        if found is None:
            return [setting]
        numbers = (
            [int(found[1])] if found[2] else [n for n in layers if f"{n}".startswith(found[1])]
        )
        before, after = text[: found.start(1)], text[found.end() :]
        return [{**setting, "filter": f"{before}{n + shift}.{after}"} for n in numbers]
    if isinstance(setting, list) and any(isinstance(item, dict) for item in setting):
        return [new for item in setting for new in renumbered(item, shift, layers)] or None
    return setting
