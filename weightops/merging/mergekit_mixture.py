"""Translate the YAML of mergekit-moe into a recipe for the same mixture of experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from weightops.errors import RecipeError
from weightops.merging.mergekit_parameters import Reader
from weightops.merging.mergekit_values import number, whole
from weightops.merging.yaml_lines import LinedDict, LinedList, line_of, lines_of, located

_TOP = (
    *("base_model", "experts", "gate_mode", "dtype", "experts_per_token", "shared_experts"),
    "architecture",
)
_PROMPTS = ("positive_prompts", "negative_prompts", "residual_scale")
_EXPERT = ("source_model", *_PROMPTS, "noise_scale")


def looks_like_mixture(content: Mapping[str, Any]) -> bool:
    """Return True for a mapping with the keys of mergekit-moe."""
    return "experts" in content


def translate_mixture(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the recipe for the mixture that a configuration of mergekit-moe 0.1.5 describes.

    Raises:
        RecipeError: for what mergekit refuses, with the line where it is known.
    """
    reader = Reader()
    reader.check_keys(content, _TOP, "the top level")
    if not content.get("base_model"):
        raise RecipeError("a mixture of experts needs base_model")
    with located(line_of(content, "base_model")):
        base = reader.reference(content["base_model"])
    kept = [key for key in ("gate_mode", "experts_per_token", "architecture") if key in content]
    mixture = LinedDict({key: content[key] for key in kept}, lines_of(content))
    with located(line_of(content, "experts_per_token")):
        if "experts_per_token" in content:
            mixture["experts_per_token"] = whole(content["experts_per_token"], "experts_per_token")
    for key in ("experts", "shared_experts"):
        if content.get(key) is not None:
            mixture[key] = _experts(reader, content, key)
    recipe = LinedDict({"base": base, "mixture": mixture})
    if content.get("dtype"):
        recipe["dtype"] = str(content["dtype"]).removeprefix("torch.")
    lines = lines_of(content)
    places = {"base": "base_model", "mixture": "experts", "dtype": "dtype"}
    recipe.lines = {key: lines[place] for key, place in places.items() if place in lines}
    return recipe


def _experts(reader: Reader, content: Mapping[str, Any], key: str) -> Any:
    """Return the experts of a list, with their references as text."""
    listed = content[key]
    if not isinstance(listed, list):
        return listed  # which the recipe refuses
    experts = LinedList((), lines_of(listed))
    for i, entry in enumerate(listed):
        with located(line_of(listed, i)):
            reader.check_keys(entry, _EXPERT, "an expert")
            if entry.get("noise_scale"):
                raise RecipeError("noise_scale isn't supported")
            expert = LinedDict(
                {name: entry[name] for name in _PROMPTS if entry.get(name) is not None},
                lines_of(entry),
            )
            with located(line_of(entry, "residual_scale")):
                if "residual_scale" in expert:
                    expert["residual_scale"] = number(expert["residual_scale"], "residual_scale")
            if entry.get("source_model") is not None:
                expert["model"] = reader.reference(entry["source_model"])
        experts.append(expert)
    return experts
