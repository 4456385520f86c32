"""Check what a recipe says, and return it as the fields of a `Recipe`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from weightops.algebra.names import Each, PerTensor
from weightops.errors import RecipeError
from weightops.merging.chat_templates import check_chat_template
from weightops.merging.tokenizer_choice import TokenizerChoice
from weightops.merging.yaml_lines import line_of, located, plain
from weightops.support.registry import unknown

KEYS = (
    *("method", "base", "models", "slices", "modules", "alpha", "options", "seed", "dtype"),
    *("batchnorm", "tokenizer", "chat_template", "name", "named", "base_layers"),
)
WHOLE = ("dtype", "batchnorm", "tokenizer", "chat_template", "named", "name")
"""The keys that belong to a whole recipe, not to a slice or a module of it."""
EACH = "each"
"""The key of an option with one value for each model: ``{each: [0.2, 0.5]}``."""
_MODEL_KEYS = ("model", "weight", "layers")


def check_keys(content: Mapping[str, Any], known: Sequence[str], kind: str) -> None:
    """Check the keys of a mapping.

    Raises:
        UnknownNameError: for an unknown key, with the nearest, and its line.
    """
    for key in content:
        if key not in known:
            with located(line_of(content, key)):
                raise unknown(kind, str(key), known)


def whole_fields(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that belong to a whole recipe.

    Raises:
        RecipeError: for a value that its key can't have.
        UnknownNameError: for an unknown key.
    """
    fields = {key: content.get(key) for key in ("dtype", "batchnorm", "name")}
    if content.get("tokenizer") is not None:
        with located(line_of(content, "tokenizer")):
            fields["tokenizer"] = TokenizerChoice.of(content["tokenizer"])
    if content.get("chat_template") is not None:
        with located(line_of(content, "chat_template")):
            check_chat_template(content["chat_template"])
        fields["chat_template"] = content["chat_template"]
    return fields


def whole_lines(content: Mapping[str, Any]) -> dict[str, str]:
    """Return the lines of what only a merge can check: tokens, and keys of the whole recipe."""
    tokenizer = content.get("tokenizer")
    tokens = tokenizer.get("tokens") if isinstance(tokenizer, Mapping) else None
    lines = {str(token): line_of(tokens, token) for token in tokens or ()}
    return lines | {key: line_of(content, key) for key in ("tokenizer", "chat_template")}


def merge_fields(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a recipe without slices or modules, or of a slice.

    Raises:
        RecipeError: for a value that its key can't have.
        UnknownNameError: for an unknown key.
    """
    check_keys(content, KEYS, "recipe key")
    listed = content.get("models")
    if not isinstance(listed, list) or not listed:
        raise RecipeError(
            "a recipe needs models",
            hint="models: is a list of refs, each alone or as {model: ref, weight: number}",
        )
    entries = [entry if isinstance(entry, dict) else {"model": entry} for entry in listed]
    lines = {}
    for i, entry in enumerate(entries):
        with located(line_of(listed, i)):
            check_keys(entry, _MODEL_KEYS, "key of a model")
            if not isinstance(entry.get("model"), str):
                raise RecipeError(f"{dict(entry)} names no model")
        lines[entry["model"]] = line_of(entry, "model") or line_of(listed, i)
    weights = tuple(_numbers(entry.get("weight", 1.0), "weight") for entry in entries)
    layers = tuple(_layers(entry["layers"]) for entry in entries if "layers" in entry)
    if len(layers) not in (0, len(entries)):
        raise RecipeError("either each model of a slice has layers, or none")
    base_layers = content.get("base_layers")
    return {
        "models": tuple(entry["model"] for entry in entries),
        "method": str(content.get("method", "linear")),
        "base": content.get("base"),
        "weights": weights if any(weight != 1.0 for weight in weights) else None,
        "alpha": _numbers(content.get("alpha", 1.0), "alpha"),
        "options": _options(content.get("options") or {}),
        "seed": int(_numbers(content.get("seed", 0), "seed")),
        "layers": layers or None,
        "base_layers": None if base_layers is None else _layers(base_layers),
        "lines": {str(content.get("base")): line_of(content, "base"), **lines},
    }


def check_pieces(pieces: Any, others: Sequence[str]) -> None:
    """Check that slices are a list of recipes, without keys of the whole recipe.

    Raises:
        RecipeError: saying what is there instead.
    """
    listed = isinstance(pieces, list) and all(isinstance(piece, dict) for piece in pieces)
    if others or not listed or not pieces:
        raise RecipeError(
            "slices is a list of recipes, with no other key than dtype beside it; there is "
            f"{list(others) or pieces!r}"
        )
    for i, piece in enumerate(pieces):
        for key in (*WHOLE, "slices", "modules"):
            if key in piece:
                with located(line_of(pieces, i)):
                    raise RecipeError(f"{key} is for the whole recipe, not for one of its slices")


def _options(content: Any) -> dict[str, Any]:
    """Return a method's options, with `Each` where a value is one for each model."""
    if not isinstance(content, dict):
        raise RecipeError("options is a mapping of the method's options to values")
    return {
        str(name): Each(map(plain, value[EACH]))
        if isinstance(value, dict) and list(value) == [EACH]
        else plain(value)
        for name, value in content.items()
    }


def _layers(value: Any) -> tuple[int, int]:
    """Return a range of layers.

    Raises:
        RecipeError: if it isn't two whole numbers, the second larger.
    """
    two = isinstance(value, (list, tuple)) and len(value) == 2
    if not two or not all(type(v) is int and v >= 0 for v in value) or value[1] <= value[0]:
        raise RecipeError(f"layers are [from, to], counted from 0, without the last; not {value}")
    return value[0], value[1]


def _numbers(value: Any, name: str) -> PerTensor:
    """Return a `PerTensor` of finite numbers.

    Raises:
        RecipeError: if it holds anything else.
    """
    if isinstance(value, dict):
        return {str(pattern): _numbers(inner, name) for pattern, inner in value.items()}
    if isinstance(value, list) and value:
        return [_numbers(inner, name) for inner in value]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise RecipeError(
            f"{name} is a number, a mapping of name patterns to numbers, or a list of numbers, "
            f"not {value!r}"
        )
    return float(value)
