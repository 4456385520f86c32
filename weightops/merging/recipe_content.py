"""Check what a recipe says, and return it as the fields of a `Recipe`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from weightops.algebra.dtypes import EDITABLE
from weightops.errors import RecipeError
from weightops.merging.chat_templates import check_chat_template
from weightops.merging.mixture_choice import Mixture
from weightops.merging.recipe_values import (
    align_of,
    check_keys,
    flag_of,
    layers_of,
    numbers_of,
    options_of,
    rank_of,
    seed_of,
    statistics_of,
)
from weightops.merging.tokenizer_choice import TokenizerChoice
from weightops.merging.yaml_lines import line_of, located
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
_MODEL_KEYS = ("model", "weight", "layers", "statistics")


def whole_fields(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that belong to a whole recipe.

    Raises:
        RecipeError: for a value that its key can't have.
        UnknownNameError: for an unknown key.
    """
    fields = {key: content.get(key) for key in _NAMES}
    for key, value in fields.items():
        if not isinstance(value, (str, type(None))):
            raise RecipeError(f"{key} is {value!r:.80}, and must be a name")
    with located(line_of(content, "packed_experts")):
        fields["packed_experts"] = flag_of("packed_experts", content.get("packed_experts", False))
    if fields["fill_missing"] is not None and content.get("tokenizer") is not None:
        raise RecipeError("fill_missing keeps the vocabulary of the whole model: no tokenizer")
    with located(line_of(content, "dtype")):
        if fields["dtype"] is not None and fields["dtype"] not in EDITABLE:
            raise unknown("dtype to write", fields["dtype"], EDITABLE)
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
    keys = ("tokenizer", "chat_template", "fill_missing", "like", "name")
    return lines | {key: line_of(content, key) for key in keys}


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
    weights = []
    for i, entry in enumerate(entries):
        with located(line_of(listed, i)):
            check_keys(entry, _MODEL_KEYS, "key of a model")
            if not isinstance(entry.get("model"), str):
                raise RecipeError(f"{dict(entry)!r:.200} names no model")
            with located(line_of(entry, "weight")):
                weights.append(numbers_of(entry.get("weight", 1.0), "weight"))
    statistics = tuple(statistics_of(entry.get("statistics") or {}) for entry in entries)
    layers = tuple(layers_of(entry["layers"]) for entry in entries if "layers" in entry)
    if len(layers) not in (0, len(entries)):
        raise RecipeError("either each model of a slice has layers, or none")
    if not isinstance(content.get("base"), (str, type(None))):
        raise RecipeError(f"base is {content['base']!r:.80}, and must be a name")
    if layers and any(statistics):
        raise RecipeError("statistics are of whole models, not of the layers of a slice")
    with located(line_of(content, "alpha")):
        alpha = numbers_of(content.get("alpha", 1.0), "alpha")
    with located(line_of(content, "align")):
        align = align_of(content.get("align", False), bool(layers))
    base_layers, options = content.get("base_layers"), options_of(content.get("options") or {})
    return {
        "models": tuple(entry["model"] for entry in entries),
        "method": str(content.get("method", "linear"))[:200],
        "base": content.get("base"),
        "weights": tuple(weights) if any(weight != 1.0 for weight in weights) else None,
        "alpha": alpha,
        "options": options,
        "seed": seed_of(content.get("seed", 0)),
        "rank": None if content.get("rank") is None else rank_of(content["rank"]),
        "layers": layers or None,
        "statistics": statistics if any(statistics) else None,
        "align": align,
        "base_layers": None if base_layers is None else layers_of(base_layers),
        "lines": _lines_of_merge(content, entries),
    }


def _lines_of_merge(content: Mapping[str, Any], entries: Sequence[Any]) -> dict[str, str]:
    """Return the lines of what only a merge can check: models, and values by patterns of names."""
    lines = {str(content.get("base")): line_of(content, "base")}
    lines |= {key: line_of(content, key) for key in ("method", "alpha")}
    options = content.get("options")
    lines |= {f"option {name}": line_of(options, name) for name in options or ()}
    for i, entry in enumerate(entries):
        ref = entry["model"]
        lines[ref] = line_of(entry, "model") or line_of(content["models"], i)
        lines[f"the weight of {ref}"] = line_of(entry, "weight")
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
        with located(line_of(content, others[0])):
            raise RecipeError(f"{others[0]} doesn't go with mixture, which has models of its own")
    if not isinstance(content.get("base"), str):
        raise RecipeError("a mixture needs base, the model that all but the experts is taken from")
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
        "seed": seed_of(content.get("seed", 0)),
    }
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
