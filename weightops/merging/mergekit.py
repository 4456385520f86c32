"""mergekit's YAML as weightops' recipe: the same merge, or a refusal that names what can't be done."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any, NamedTuple

from weightops.algebra.names import PerTensor
from weightops.errors import RecipeError
from weightops.support.registry import unknown

_TOP = (
    "merge_method",
    "models",
    "slices",
    "base_model",
    "parameters",
    "dtype",
    "out_dtype",
    "tokenizer_source",
)
_IGNORED = ("int8_mask",)
"""Parameters that change how mergekit computes, and not what."""


class _Rule(NamedTuple):
    """How a method of mergekit's is called here: parameter -> option, options that are always set, and defaults."""

    method: str
    shared: Mapping[str, str] = {}
    fixed: Mapping[str, Any] = {}
    weight: bool = True
    normalize: bool | None = None  # mergekit's default, where it has the parameter
    elects: bool = False
    rescale: bool = False
    on_base: bool | None = True  # None: with a base or without


def _sparse(
    method: str, *options: str, normalize: bool = False, elects: bool = False, rescale: bool = False
) -> _Rule:
    fixed = {"rescale": "l1"} if rescale else {}
    return _Rule(
        method, {o: o for o in options}, fixed, normalize=normalize, elects=elects, rescale=rescale
    )


_RULES = {
    "linear": _Rule("linear", {"normalize": "normalize"}, on_base=False),
    "slerp": _Rule("slerp", {"t": "t"}, {"parallel": 0.9995}, weight=False, on_base=False),
    "nuslerp": _Rule("nuslerp", on_base=None),
    "karcher": _Rule(
        "karcher",
        {"max_iter": "steps", "tol": "tolerance"},
        {"steps": 10, "tolerance": 1e-5},
        weight=False,
        on_base=False,
    ),
    "passthrough": _Rule("passthrough", {"scale": "scale"}, weight=False, on_base=False),
    "model_stock": _Rule("model_stock", weight=False),
    "task_arithmetic": _Rule("task_arithmetic", normalize=False),
    "ties": _sparse("ties", "density", normalize=True, elects=True),
    "dare_linear": _sparse("dare_linear", "density", rescale=True),
    "dare_ties": _sparse("dare_ties", "density", elects=True, rescale=True),
    "breadcrumbs": _sparse("breadcrumbs", "density", "gamma"),
    "breadcrumbs_ties": _sparse("breadcrumbs_ties", "density", "gamma", elects=True),
    "della_linear": _sparse("della_linear", "density", "epsilon", rescale=True),
    "della": _sparse("della", "density", "epsilon", normalize=True, elects=True, rescale=True),
    "sce": _Rule("sce", {"select_topk": "select_topk"}, weight=False),
}
_DEFAULTS = {"density": 1.0, "gamma": 0.01, "epsilon": 0.15}
_REFUSED = {"nuslerp_row_wise": False, "nuslerp_flatten": True, "filter_wise": False}
"""Parameters that are understood at one value only."""


def looks_like_mergekit(content: Mapping[str, Any]) -> bool:
    """True for a mapping with mergekit's keys."""
    return "merge_method" in content


def translate(content: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe that does what a configuration of mergekit 0.1.5 does.

    Raises:
        RecipeError: naming what isn't supported or isn't known, which mergekit would ignore.
    """
    for key in content:
        if key not in _TOP:
            raise unknown("key of mergekit's that is supported", str(key), _TOP)
    slices = content.get("slices") or ()
    ranged = any(
        "layer_range" in source for piece in slices for source in piece.get("sources") or ()
    )
    return _slices(content) if len(slices) > 1 or ranged else _one(content)


def _one(content: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without slices, or with one."""
    name = content["merge_method"]
    if name not in _RULES:
        raise unknown("merge method of mergekit's that is supported", str(name), _RULES)
    rule = _RULES[name]
    if content.get("tokenizer_source") not in (None, "base"):
        raise RecipeError(
            f"tokenizer_source: {content['tokenizer_source']} is not supported; the base's tokenizer is kept"
        )
    inputs, shared = _inputs(content)
    base = content.get("base_model")
    others = [entry for entry in inputs if entry["model"] != base]
    if name == "slerp":
        if base is None or len(others) != 1:
            raise RecipeError("slerp needs base_model and one other model")
        inputs, base = [{"model": base}, *others], None
    elif name == "karcher" and base is not None:
        inputs, base = [*inputs, *([{"model": base}] if len(others) == len(inputs) else [])], None
    elif rule.on_base is False:
        if base is not None and len(others) == len(inputs):
            raise RecipeError(f"{name} takes no base_model beside its models")
        base = None
    elif base is None and rule.on_base:
        raise RecipeError(f"{name} needs base_model")
    else:
        inputs = others
    return _recipe(rule, name, inputs, shared, base, content)


def _slices(content: Mapping[str, Any]) -> dict[str, Any]:
    """Each slice as a recipe of its own, with the layers that it takes."""
    dtype = content.get("out_dtype") or content.get("dtype")
    pieces = []
    for piece in content["slices"]:
        alone = {
            **content,
            "slices": [piece],
            **({"base_model": piece["base_model"]} if "base_model" in piece else {}),
        }
        recipe = _one(alone)
        recipe.pop("dtype", None)
        ranges = {entry["model"]: entry.get("layer_range") for entry in piece["sources"]}
        if recipe.get("base") is not None and ranges.get(recipe["base"]) not in (
            None,
            *list(ranges.values())[:1],
        ):
            raise RecipeError(
                "a base_model with other layers than the models of its slice is not supported"
            )
        recipe["models"] = [
            {**entry, "layers": ranges[entry["model"]]} for entry in recipe["models"]
        ]
        pieces.append(recipe)
    return {"slices": pieces, **({"dtype": dtype} if dtype else {})}


def _inputs(content: Mapping[str, Any]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The models with their parameters, and the parameters for all of them."""
    shared = dict(content.get("parameters") or {})
    if ("models" in content) == ("slices" in content):
        raise RecipeError("exactly one of models and slices must be there")
    if "models" in content:
        entries, known = content["models"], ["model", "parameters"]
    else:
        [piece] = content["slices"]
        for key in piece:
            if key not in ("sources", "parameters", "base_model"):
                raise RecipeError(f"{key} of a slice is not supported")
        entries, known = piece["sources"], ["model", "layer_range", "parameters"]
        shared |= piece.get("parameters") or {}
    for entry in entries:
        for key in entry:
            if key not in known:
                raise unknown("key of a model in mergekit's recipes", str(key), known)
    return [dict(entry) for entry in entries], shared


def _recipe(
    rule: _Rule,
    name: str,
    inputs: list[dict[str, Any]],
    shared: dict[str, Any],
    base: str | None,
    content: Mapping[str, Any],
) -> dict[str, Any]:
    per_model = {"weight", "density", "gamma", "epsilon", "scale"}
    allowed = {
        *rule.shared,
        *_IGNORED,
        *_REFUSED,
        *(["weight"] if rule.weight else []),
        *(["lambda"] if rule.normalize is not None else []),
        *(["normalize"] if rule.normalize is not None else []),
        *(["rescale"] if rule.rescale else []),
    }
    for place, parameters in [
        ("parameters", shared),
        *((e["model"], e.get("parameters") or {}) for e in inputs),
    ]:
        for key in parameters:
            if key not in allowed or (place != "parameters" and key not in per_model):
                raise RecipeError(f"{place} has {key!r}, which {name} doesn't take there")
    for key, value in _REFUSED.items():
        if shared.get(key, value) != value:
            raise RecipeError(f"{key}: {shared[key]} is not supported")
    options: dict[str, Any] = dict(rule.fixed)
    for key, option in rule.shared.items():
        values = [
            _scoped((e.get("parameters") or {}).get(key), shared.get(key), _DEFAULTS.get(key))
            for e in inputs
        ]
        if any(value != values[0] for value in values):
            options[option] = {"each": values}
        elif values[0] is not None:
            options[option] = values[0]
    if rule.rescale and shared.get("rescale", True) is False:
        options["rescale"] = "none"
    weights: list[PerTensor] = [1.0] * len(inputs)
    if rule.weight:
        for i, entry in enumerate(inputs):
            value = _scoped((entry.get("parameters") or {}).get("weight"), shared.get("weight"))
            if value is None or (isinstance(value, Mapping) and "*" not in value):
                raise RecipeError(f"{entry['model']} has no weight, which {name} needs")
            weights[i] = value
    if rule.normalize is not None and shared.get("normalize", rule.normalize):
        if rule.elects:
            options["normalize"] = "weights"
        else:
            if (
                not all(isinstance(weight, (int, float)) for weight in weights)
                or abs(sum(weights)) < 1e-8
            ):
                raise RecipeError(
                    "normalize with weights by layer or filter is not supported without an election of signs"
                )
            weights = [weight / sum(weights) for weight in weights]
    elif rule.elects:
        options["normalize"] = "none"
    recipe: dict[str, Any] = {
        "method": rule.method,
        "models": [
            {"model": entry["model"], "weight": weight}
            for entry, weight in zip(inputs, weights, strict=True)
        ],
        "options": options,
    }
    if base is not None:
        recipe |= {"base": base, "alpha": _scoped(shared.get("lambda"), 1.0)}
    dtype = content.get("out_dtype") or content.get("dtype")
    return recipe | ({"dtype": dtype} if dtype else {})


def _scoped(*scopes: Any) -> PerTensor:
    """The first of some values; where it is for filters that don't match, the next."""
    found: dict[str, PerTensor] = {}
    for value in scopes:
        setting = None if value is None else _setting(value)
        if setting is None:
            continue
        if not isinstance(setting, Mapping):
            return {**found, "*": setting} if found else setting
        found = {
            **found,
            **{pattern: inner for pattern, inner in setting.items() if pattern not in found},
        }
        if "*" in found:
            break
    return found or None


def _setting(value: Any) -> PerTensor:
    """Scalars, gradients over the layers, and filters, as a `PerTensor`: mergekit gives other tensors than layers a gradient's start."""
    if isinstance(value, dict):
        value = [value]
    if isinstance(value, list) and value and all(isinstance(v, dict) for v in value):
        found: dict[str, PerTensor] = {}
        for condition in value:
            for key in condition:
                if key not in ("filter", "value"):
                    raise unknown(
                        "key of a conditional value in mergekit's recipes",
                        str(key),
                        ("filter", "value"),
                    )
            text = condition.get("filter")
            inner = _setting(condition["value"])
            pattern = "*" if text in (None, "*") else f"*{text}*"
            if isinstance(inner, Mapping):
                found |= {_both(pattern, p): v for p, v in inner.items()}
            else:
                found.setdefault(pattern, inner)
        return found
    if isinstance(value, list):
        return {"*.[0-9]*.*": [float(v) for v in value], "*": float(value[0])}
    if isinstance(value, str):  # as YAML reads 1e-5
        with suppress(ValueError):
            value = float(value)
    return (
        float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value
    )


def _both(outer: str, inner: str) -> str:
    """A pattern for what two match: one of them is `*`, or the layer's number comes first, as it does in transformers' names."""
    if "*" in (outer, inner):
        return inner if outer == "*" else outer
    return inner.removesuffix("*") + outer
