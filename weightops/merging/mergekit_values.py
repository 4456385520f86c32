"""Translate the values in mergekit's YAML, which may depend on the tensor, into `PerTensor`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from weightops.algebra.names import PerTensor, escape
from weightops.errors import RecipeError

_NUMBER = re.compile(r"(?<![^.])(?:layers?|h|blocks?)\.(\d+)(\.|$)")
"""The number of a layer in a filter, and the dot behind it."""


def scoped(*scopes: Any) -> PerTensor:
    """Return the value of the innermost scope; where its filters don't match, of the next one."""
    values: dict[str, PerTensor] = {}
    for scope in scopes:
        value = None if scope in (None, []) else _per_tensor(scope)
        if value is None:
            continue
        if not isinstance(value, Mapping):
            return {**values, "*": value} if values else value
        values |= {pattern: inner for pattern, inner in value.items() if pattern not in values}
        if "*" in values:
            break
    return values or None


def _per_tensor(value: Any) -> PerTensor:
    """Translate a scalar, a gradient over the layers, or filters.

    mergekit gives tensors outside of the layers a gradient's first value.
    """
    if isinstance(value, dict):
        value = [value]
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        return _filtered(value)
    if isinstance(value, list):
        return {"*.[0-9]*.*": [float(item) for item in value], "*": float(value[0])}
    if isinstance(value, str):
        with suppress(ValueError):
            value = float(value)  # YAML reads 1e-5 as text
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if number else value


def _filtered(conditions: Sequence[Mapping[str, Any]]) -> dict[str, PerTensor]:
    """Translate conditional values, ``{filter: text, value: ...}``."""
    values: dict[str, PerTensor] = {}
    for condition in conditions:
        if "value" not in condition:
            raise RecipeError(f"a conditional value {dict(condition)!r:.80} has no value")
        text = condition.get("filter")
        pattern = "*" if text in (None, "*", "") else f"*{escape(str(text))}*"
        value = _per_tensor(condition["value"])
        inner = value if isinstance(value, Mapping) else {"*": value}
        for key, each in inner.items():
            values.setdefault(_intersection(pattern, key), each)
        if pattern == "*":
            break
    return values


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


def _intersection(outer: str, inner: str) -> str:
    """Return a pattern for the names that two patterns match.

    One of them is ``*``, or the layer's number comes first, as in transformers' names.
    """
    if "*" in (outer, inner):
        return inner if outer == "*" else outer
    return inner.removesuffix("*") + outer
