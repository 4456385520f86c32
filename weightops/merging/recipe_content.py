"""Check what a recipe says, and return it as the fields of a `Recipe`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from weightops.algebra.dtypes import EDITABLE
from weightops.errors import RecipeError, WeightopsError
from weightops.merging.chat_templates import check_chat_template
from weightops.merging.methods.method import Method
from weightops.merging.mixture_choice import Mixture
from weightops.merging.recipe_values import (
    check_keys,
    flag_of,
    layers_of,
    method_of,
    name_of,
    numbers_of,
    options_of,
    rank_of,
    seed_of,
    statistics_of,
)
from weightops.merging.tokenizer_choice import TokenizerChoice
from weightops.merging.yaml_lines import LinedDict, at, line_of, lines_of, located
from weightops.support.registry import unknown

KEYS = (
    *("method", "base", "models", "slices", "modules", "alpha", "options", "seed", "rank", "dtype"),
    *("batchnorm", "tokenizer", "chat_template", "fill_missing", "name", "named", "base_layers"),
    *("mixture", "align", "packed_experts", "like"),
)
WHOLE = (
    "dtype",
    "batchnorm",
    "tokenizer",
    "chat_template",
    "fill_missing",
    "like",
    "named",
    "name",
    "packed_experts",
)
"""The keys that belong to a whole recipe, not to a slice or a module of it."""
_NAMES = ("dtype", "batchnorm", "fill_missing", "like", "name")
_VALUES: Mapping[str, Callable[[Any], Any]] = {
    "base": lambda value: None if value is None else name_of("base", value),
    "alpha": partial(numbers_of, name="alpha"),
    "options": lambda value: options_of(value or {}),
    "seed": seed_of,
    "rank": lambda value: None if value is None else rank_of(value),
    "align": partial(flag_of, "align"),
    "base_layers": lambda value: None if value is None else layers_of(value),
}
"""Key of a merge -> what checks its value."""
_OF_MODEL: Mapping[str, Callable[[Any], Any]] = {
    "model": lambda value: value,
    "weight": partial(numbers_of, name="weight"),
    "layers": layers_of,
    "statistics": lambda value: statistics_of(value or {}),
}
"""Key of a model -> what checks its value."""


@contextmanager
def in_file(file: str) -> Iterator[None]:
    """Put a recipe's file, if there is one, before errors, whose hints name its keys.

    >>> with in_file("r.yaml"):
    ...     raise RecipeError("it needs a base", hint="base=...")
    Traceback (most recent call last):
    weightops.errors.RecipeError: r.yaml: it needs a base
    hint: base: ...
    """
    try:
        yield
    except WeightopsError as error:
        if not file:
            raise
        keys = "|".join([*KEYS, "statistics"])
        hint = re.sub(rf"\b({keys})=(?=[.\w'\"])", r"\1: ", error.hint)
        hint = re.sub(rf"\b({keys})=", r"\1", hint)
        raise type(error)(f"{file}: {error.fact}", hint=hint) from error


def whole_fields(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that belong to a whole recipe.

    Raises:
        RecipeError: for a value that its key can't have.
        UnknownNameError: for an unknown key.
    """
    fields = {key: content.get(key) for key in _NAMES}
    for key, value in fields.items():
        if value is not None:
            with at(content, key):
                name_of(key, value)
    with at(content, "packed_experts"):
        fields["packed_experts"] = flag_of("packed_experts", content.get("packed_experts", False))
    if fields["fill_missing"] is not None and content.get("tokenizer") is not None:
        with at(content, "tokenizer"):
            raise RecipeError("fill_missing keeps the vocabulary of the whole model: no tokenizer")
    with at(content, "dtype"):
        if fields["dtype"] is not None and fields["dtype"] not in EDITABLE:
            raise unknown("dtype to write", fields["dtype"], EDITABLE)
    if content.get("tokenizer") is not None:
        with at(content, "tokenizer"):
            fields["tokenizer"] = TokenizerChoice.of(content["tokenizer"])
    if content.get("chat_template") is not None:
        with at(content, "chat_template"):
            check_chat_template(content["chat_template"])
        fields["chat_template"] = content["chat_template"]
    return fields


def whole_lines(content: Mapping[str, Any]) -> dict[str, str]:
    """Return the lines of what only a merge can check: tokens, and keys of the whole recipe."""
    tokenizer = content.get("tokenizer")
    tokens = tokenizer.get("tokens") if isinstance(tokenizer, Mapping) else None
    lines = {str(token): line_of(tokens, token) for token in tokens or ()}
    keys = ("tokenizer", "chat_template", "fill_missing", "like", "name", "batchnorm")
    return lines | {key: line_of(content, key) for key in keys}


def merge_fields(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a recipe without slices or modules, or of a slice.

    Raises:
        RecipeError: for a value that its key can't have.
        UnknownNameError: for an unknown key.
    """
    check_keys(content, KEYS, "recipe key")
    entries = _entries(content)
    with at(content, "method"):
        method = method_of(str(content.get("method", "linear")))
    fields: dict[str, Any] = {"method": method.name}
    for key, check in _VALUES.items():
        if key in content:
            with at(content, key):
                fields[key] = check(content[key])
    options = fields.get("options", {})
    for name, value in options.items():
        with at(content["options"], name):
            method.check({name: value})
    weights = [entry.get("weight", 1.0) for entry in entries]
    layers = tuple(entry["layers"] for entry in entries if "layers" in entry)
    if len(layers) not in (0, len(entries)):
        raise RecipeError("either each model of a slice has layers, or none")
    if layers and fields.get("align"):
        with at(content, "align"):
            raise RecipeError("align is of whole models, not of the layers of a slice")
    return {
        **fields,
        "models": tuple(entry["model"] for entry in entries),
        "weights": tuple(weights) if any(weight != 1.0 for weight in weights) else None,
        "layers": layers or None,
        "statistics": _statistics(content["models"], entries, method, bool(layers)),
        "lines": _lines_of_merge(content, entries),
    }


def _entries(content: Mapping[str, Any]) -> list[LinedDict]:
    """Return the models of a recipe, each with the values of its keys."""
    with at(content, "models"):
        listed = content.get("models")
        if not isinstance(listed, list) or not listed:
            raise RecipeError(
                "a recipe needs models",
                hint="models: is a list of refs, each alone or as {model: ref, weight: number}",
            )
    entries = []
    for i, given in enumerate(listed):
        entry = LinedDict(given if isinstance(given, dict) else {"model": given}, lines_of(given))
        with at(listed, i):
            check_keys(entry, tuple(_OF_MODEL), "key of a model")
            if not isinstance(entry.get("model"), str):
                raise RecipeError(f"{dict(entry)!r:.200} names no model")
            for key, check in _OF_MODEL.items():
                if key in entry:
                    with at(entry, key):
                        entry[key] = check(entry[key])
        entries.append(entry)
    return entries


def _statistics(
    listed: Sequence[Any], entries: Sequence[LinedDict], method: Method, in_slice: bool
) -> tuple[dict[str, Any], ...] | None:
    """Return each model's statistics, which are those that the method takes."""
    of_models = tuple(entry.get("statistics", {}) for entry in entries)
    for i, (entry, own) in enumerate(zip(entries, of_models, strict=True)):
        with located(line_of(entry, "statistics") or line_of(listed, i)):
            if in_slice and own:
                raise RecipeError("statistics are of whole models, not of the layers of a slice")
            if own and not method.statistics:
                raise RecipeError(f"{method.name} takes no statistics", hint="leave them out")
            if set(own) != set(method.statistics) and any(of_models):
                kinds = " and ".join(method.statistics)
                raise RecipeError(
                    f"{method.name} takes the statistics {kinds}, and {entry['model']} has "
                    f"{' and '.join(own) or 'none'}",
                    hint=f"such as statistics: {{{method.statistics[0]}: {{task: mnist}}}}",
                )
    return of_models if any(of_models) else None


def _lines_of_merge(content: Mapping[str, Any], entries: Sequence[LinedDict]) -> dict[str, str]:
    """Return the lines of what only a merge can check: models, and values by patterns of names."""
    lines = {str(content.get("base")): line_of(content, "base")}
    lines |= {key: line_of(content, key) for key in ("method", "alpha", "rank", "align")}
    options = content.get("options")
    lines |= {f"option {name}": line_of(options, name) for name in options or ()}
    listed = content["models"]
    for i, entry in enumerate(entries):
        ref = entry["model"]
        lines[ref] = line_of(entry, "model") or line_of(listed, i)
        if "weight" in entry:
            lines[f"the weight of {ref}"] = line_of(entry, "weight")
        for kind in entry.get("statistics", {}):
            lines[f"the {kind} of model {i + 1}"] = line_of(listed[i]["statistics"], kind)
    return lines


def mixture_fields(content: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the fields of a recipe of a mixture of experts, and the lines of its models.

    Raises:
        RecipeError: for a value that its key can't have.
        UnknownNameError: for an unknown key or gate mode.
    """
    known = (
        "base",
        "mixture",
        "seed",
        *(key for key in WHOLE if key not in ("tokenizer", "batchnorm", "packed_experts")),
    )
    others = [key for key in content if key not in known]
    if others:
        with at(content, others[0]):
            raise RecipeError(f"{others[0]} doesn't go with mixture, which has models of its own")
    if not isinstance(content.get("base"), str):
        with at(content, "base"):
            raise RecipeError(
                "a mixture needs base, the model that all but the experts is taken from"
            )
    lines = {content["base"]: line_of(content, "base"), "mixture": line_of(content, "mixture")}
    with located(lines["mixture"]):
        mixture = Mixture.of(content["mixture"])
    for key in ("experts", "shared_experts"):
        listed = content["mixture"].get(key) or []
        for i, entry in enumerate(listed):
            lines.setdefault(entry["model"], line_of(entry, "model") or line_of(listed, i))
    fields = {
        "models": tuple(expert.model for expert in mixture.all_experts),
        "method": "passthrough",
        "base": content["base"],
        "mixture": mixture,
    }
    if "seed" in content:
        with at(content, "seed"):
            fields["seed"] = seed_of(content["seed"])
    return fields, lines


def check_pieces(pieces: Any, others: Sequence[str]) -> None:
    """Check that slices are a list of recipes, without keys of the whole recipe.

    Raises:
        RecipeError: saying what is there instead.
    """
    listed = isinstance(pieces, list) and all(isinstance(piece, dict) for piece in pieces)
    if others or not listed or not pieces:
        raise RecipeError(
            "slices is a list of recipes, with no other key than dtype beside it; there is "
            f"{list(others) or pieces!r:.200}"
        )
    for i, piece in enumerate(pieces):
        for key in (*WHOLE, "slices", "modules", "mixture"):
            if key in piece:
                with located(line_of(pieces, i)):
                    raise RecipeError(f"{key} is for the whole recipe, not for one of its slices")
