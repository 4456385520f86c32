"""Check that each value in a configuration of mergekit's is of the kind that its key takes."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date
from typing import Any

from weightops.errors import RecipeError
from weightops.merging.yaml_lines import line_of, located

_NAMES = ("merge_method", "dtype", "out_dtype", "tokenizer_source", "chat_template")
_KINDS: dict[type, str] = {
    **{str: "text", dict: "a mapping", list: "a list"},
    **{int: "a number", float: "a number", date: "a date"},
}


def check_kinds(content: Mapping[str, Any]) -> None:
    """Check the kinds of all values, so that what follows can rely on them.

    Raises:
        RecipeError: naming the line, the key, its value, and what is expected.
    """
    for key in _NAMES:
        _check(content, key, str)
    _check(content, "name", str, int, float, date)
    _check(content, "base_model", str, dict)
    _check(content, "tokenizer", dict)
    _check_parameters(content)
    _check_merge(content)
    _check(content, "modules", dict)
    for name in content.get("modules") or ():
        module = _entry(content["modules"], name, f"the module {name}")
        _check_parameters(module)
        _check_merge(module)
    tokenizer = content.get("tokenizer") or {}
    _check(tokenizer, "source", str, dict)
    _check(tokenizer, "tokens", dict)
    for token in tokenizer.get("tokens") or ():
        _check(_entry(tokenizer["tokens"], token, f"the token {token}"), "source", str, dict)


def _check_merge(content: Mapping[str, Any]) -> None:
    """Check the models or slices of a configuration or module."""
    _check(content, "models", list)
    _check(content, "slices", list)
    for i in range(len(content.get("models") or ())):
        _check_model(_entry(content["models"], i, "an entry of models"))
    for i in range(len(content.get("slices") or ())):
        piece = _entry(content["slices"], i, "an entry of slices")
        with located(line_of(content["slices"], i)):
            _check_sources(piece)


def _check_sources(piece: Mapping[str, Any]) -> None:
    """Check the sources of a slice, which all have layers, or none."""
    _check(piece, "sources", list)
    _check(piece, "base_model", str, dict)
    _check_parameters(piece)
    if not piece.get("sources"):
        raise RecipeError("an entry of slices has no sources")
    sources = piece["sources"]
    for i in range(len(sources)):
        _check_model(_entry(sources, i, "an entry of sources"))
    lacking = [i for i, source in enumerate(sources) if source.get("layer_range") is None]
    if 0 < len(lacking) < len(sources):
        with located(line_of(sources, lacking[0])):
            raise RecipeError("a source has no layer_range, and others of its slice have")


def _check_model(entry: Mapping[str, Any]) -> None:
    _check(entry, "model", str, dict)
    _check_parameters(entry)
    layer_range(entry)


def layer_range(entry: Mapping[str, Any]) -> list[int] | None:
    """Return the layers of a source, of which mergekit takes 3.0 and "3" for 3, too.

    Raises:
        RecipeError: naming the line, if they aren't two whole numbers.
    """
    span = entry.get("layer_range")
    if span is None:
        return None
    try:
        ends = [float(end) for end in span if not isinstance(end, bool)]
        whole = isinstance(span, list) and all(end.is_integer() for end in ends)
        if whole and len(span) == len(ends) == 2 and 0 <= ends[0] < ends[1]:
            return [int(end) for end in ends]
    except (TypeError, ValueError, OverflowError):
        pass
    with located(line_of(entry, "layer_range")):
        raise RecipeError(
            f"layer_range is {span!r:.80}, and must be two whole numbers: the first layer, counted "
            "from 0, and the one after the last"
        )


def _check_parameters(content: Mapping[str, Any]) -> None:
    _check(content, "parameters", dict)
    for key in content.get("parameters") or ():
        with located(line_of(content["parameters"], key)):
            _check_value(content["parameters"][key], str(key))


def _check_value(value: Any, name: str, *, inner: bool = False) -> None:
    """Check a number, truth value or text; a gradient of these; or conditional values."""
    items = value if isinstance(value, list) else [value]
    for item in items:
        if isinstance(item, dict) and not inner:
            text = item.get("filter")
            if "value" not in item or not isinstance(text, (str, type(None))):
                raise RecipeError(f"{name} has the conditional value {item!r:.80}", hint=_CONDITION)
            _check_value(item["value"], name, inner=True)
        elif not isinstance(item, (bool, int, float, str)):
            raise RecipeError(f"{name} has {item!r:.80} for a value", hint=_CONDITION)
        elif isinstance(item, int) and abs(item) >= 2**63:
            raise RecipeError(f"{name} is a number of {item.bit_length()} bits, which can't be")
    if len({isinstance(item, dict) for item in items}) > 1 or (inner and not items):
        raise RecipeError(f"{name} is {value!r:.80}, and must be numbers or conditional values")


_CONDITION = "a value is a number, a list of numbers, or conditional: {filter: text, value: number}"


def _entry(container: Any, key: Any, what: str) -> Mapping[str, Any]:
    """Return an entry of a list or mapping that must be a mapping."""
    entry = container[key]
    if not isinstance(entry, dict):
        with located(line_of(container, key)):
            raise RecipeError(f"{what} is {entry!r:.80}, and must be a mapping")
    return entry


def _check(content: Mapping[str, Any], key: str, *kinds: type) -> None:
    value = content.get(key)
    if value is not None and not isinstance(value, kinds):
        expected = " or ".join(dict.fromkeys(_KINDS[kind] for kind in kinds))
        with located(line_of(content, key)):
            raise RecipeError(f"{key} is {value!r:.80}, and must be {expected}")
