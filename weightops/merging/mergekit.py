"""Translate mergekit's YAML into a recipe for the same merge, or refuse it by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from weightops.algebra.names import PerTensor
from weightops.errors import RecipeError
from weightops.merging.mergekit_values import scoped
from weightops.support.registry import unknown

_TOP_KEYS = (
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
"""Parameters that don't change the result."""
_ONE_VALUE = {"nuslerp_row_wise": False, "nuslerp_flatten": True, "filter_wise": False}
"""Parameters that are supported at one value only."""
_PER_MODEL = ("weight", "density", "gamma", "epsilon", "scale")
"""Parameters that a model may have of its own."""
_DEFAULTS = {"density": 1.0, "gamma": 0.01, "epsilon": 0.15}


class _Translation(NamedTuple):
    """A merge method of mergekit in terms of weightops.

    Attributes:
        method: the method of weightops.
        options: parameter of mergekit -> option of the method.
        fixed: options that are always set.
        weight: True if each model needs a weight.
        normalize: mergekit's default of ``normalize``, or None if the method hasn't the parameter.
        elects: True if the method elects signs.
        rescale: True if the method has the parameter ``rescale``.
        base: whether a base is needed, refused, or possible.
    """

    method: str
    options: Mapping[str, str] = {}
    fixed: Mapping[str, Any] = {}
    weight: bool = True
    normalize: bool | None = None
    elects: bool = False
    rescale: bool = False
    base: Literal["needed", "refused", "optional"] = "needed"

    @property
    def parameters(self) -> set[str]:
        """The parameters that mergekit's method takes."""
        extra = {
            "weight": self.weight,
            "lambda": self.normalize is not None,
            "normalize": self.normalize is not None,
            "rescale": self.rescale,
        }
        taken = {name for name, takes in extra.items() if takes}
        return {*self.options, *_IGNORED, *_ONE_VALUE, *taken}


def _sparse(
    method: str, *options: str, normalize: bool = False, elects: bool = False, rescale: bool = False
) -> _Translation:
    return _Translation(
        method,
        {option: option for option in options},
        {"rescale": "l1"} if rescale else {},
        normalize=normalize,
        elects=elects,
        rescale=rescale,
    )


_TRANSLATIONS = {
    "linear": _Translation("linear", {"normalize": "normalize"}, base="refused"),
    "slerp": _Translation("slerp", {"t": "t"}, {"parallel": 0.9995}, weight=False, base="refused"),
    "nuslerp": _Translation("nuslerp", base="optional"),
    "karcher": _Translation(
        "karcher",
        {"max_iter": "steps", "tol": "tolerance"},
        {"steps": 10, "tolerance": 1e-5},
        weight=False,
        base="refused",
    ),
    "passthrough": _Translation("passthrough", {"scale": "scale"}, weight=False, base="refused"),
    "model_stock": _Translation("model_stock", weight=False),
    "task_arithmetic": _Translation("task_arithmetic", normalize=False),
    "ties": _sparse("ties", "density", normalize=True, elects=True),
    "dare_linear": _sparse("dare_linear", "density", rescale=True),
    "dare_ties": _sparse("dare_ties", "density", elects=True, rescale=True),
    "breadcrumbs": _sparse("breadcrumbs", "density", "gamma"),
    "breadcrumbs_ties": _sparse("breadcrumbs_ties", "density", "gamma", elects=True),
    "della_linear": _sparse("della_linear", "density", "epsilon", rescale=True),
    "della": _sparse("della", "density", "epsilon", normalize=True, elects=True, rescale=True),
    "sce": _Translation("sce", {"select_topk": "select_topk"}, weight=False),
}


def looks_like_mergekit(content: Mapping[str, Any]) -> bool:
    """Return True for a mapping with mergekit's keys."""
    return "merge_method" in content


def translate(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the recipe for the merge that a configuration of mergekit 0.1.5 describes.

    Raises:
        RecipeError: naming what isn't supported, or what mergekit would ignore as unknown.
        UnknownNameError: for a key or method that isn't supported.
    """
    for key in content:
        if key not in _TOP_KEYS:
            raise unknown("key of mergekit's that is supported", str(key), _TOP_KEYS)
    _check_kinds(content)
    slices = content.get("slices") or ()
    ranged = any(
        "layer_range" in source for piece in slices for source in piece.get("sources") or ()
    )
    return _of_slices(content) if len(slices) > 1 or ranged else _of_models(content)


def _check_kinds(content: Mapping[str, Any]) -> None:
    """Check that each key has a value of its kind, so that what follows can rely on it.

    Raises:
        RecipeError: naming the key, its value, and what is expected.
    """
    _check_kind(content, "merge_method", str, "a name", needed=True)
    for key in ("base_model", "dtype", "out_dtype"):
        _check_kind(content, key, str, "a name")
    _check_kind(content, "parameters", dict, "a mapping")
    for key in ("models", "slices"):
        _check_kind(content, key, list, "a list with an entry at least", needed=key in content)
    for piece in content.get("slices") or ():
        _check_mapping(piece, "an entry of slices")
        _check_kind(piece, "sources", list, "a list with an entry at least", needed=True)
        _check_kind(piece, "base_model", str, "a name")
        _check_kind(piece, "parameters", dict, "a mapping")
    sources = [source for piece in content.get("slices") or () for source in piece["sources"]]
    for entry in [*(content.get("models") or ()), *sources]:
        _check_mapping(entry, "a model")
        _check_kind(entry, "model", str, "a name", needed=True)
        _check_kind(entry, "parameters", dict, "a mapping")


def _check_mapping(value: Any, what: str) -> None:
    if not isinstance(value, dict):
        raise RecipeError(f"{what} is {value!r:.80}, and must be a mapping")


def _check_kind(
    content: Mapping[str, Any], key: str, kind: type, expected: str, *, needed: bool = False
) -> None:
    value = content.get(key)
    if (value is None and not needed) or (isinstance(value, kind) and (value or not needed)):
        return
    raise RecipeError(f"{key} is {value!r:.80}, and must be {expected}")


def _of_slices(content: Mapping[str, Any]) -> dict[str, Any]:
    """Translate each slice into a recipe of its own, with its layers."""
    recipes = []
    for piece in content["slices"]:
        base = {"base_model": piece["base_model"]} if "base_model" in piece else {}
        recipe = _of_models({**content, "slices": [piece], **base})
        recipe.pop("dtype", None)
        ranges = {entry["model"]: entry.get("layer_range") for entry in piece["sources"]}
        first = next(iter(ranges.values()), None)
        if recipe.get("base") is not None and ranges.get(recipe["base"]) not in (None, first):
            raise RecipeError(
                "a base_model with other layers than the models of its slice is not supported"
            )
        recipe["models"] = [
            {**entry, "layers": ranges[entry["model"]]} for entry in recipe["models"]
        ]
        recipes.append(recipe)
    return {"slices": recipes, **_dtype(content)}


def _of_models(content: Mapping[str, Any]) -> dict[str, Any]:
    """Translate a configuration without slices, or with one."""
    name = content["merge_method"]
    if name not in _TRANSLATIONS:
        raise unknown("merge method of mergekit's that is supported", str(name), _TRANSLATIONS)
    translation = _TRANSLATIONS[name]
    if content.get("tokenizer_source") not in (None, "base"):
        raise RecipeError(
            f"tokenizer_source: {content['tokenizer_source']} is not supported",
            hint="leave it out; the base's tokenizer is kept",
        )
    inputs, shared = _inputs(content)
    inputs, base = _split_base(name, inputs, content.get("base_model"))
    _check_parameters(name, inputs, shared)
    options = _options(translation, inputs, shared)
    weights = _weights(name, inputs, shared)
    if translation.normalize is not None and shared.get("normalize", translation.normalize):
        if translation.elects:
            options["normalize"] = "weights"
        else:
            weights = _normalized(weights)
    elif translation.elects:
        options["normalize"] = "none"
    models = [
        {"model": entry["model"], "weight": weight}
        for entry, weight in zip(inputs, weights, strict=True)
    ]
    recipe: dict[str, Any] = {"method": translation.method, "models": models, "options": options}
    if base is not None:
        recipe |= {"base": base, "alpha": scoped(shared.get("lambda"), 1.0)}
    return {**recipe, **_dtype(content)}


def _dtype(content: Mapping[str, Any]) -> dict[str, Any]:
    dtype = content.get("out_dtype") or content.get("dtype")
    return {"dtype": dtype} if dtype else {}


def _inputs(content: Mapping[str, Any]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the models with their parameters, and the parameters for all of them."""
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


def _split_base(
    name: str, inputs: list[dict[str, Any]], base: str | None
) -> tuple[list[dict[str, Any]], str | None]:
    """Return the models that weightops merges, and the base that it takes task vectors from."""
    others = [entry for entry in inputs if entry["model"] != base]
    base_is_apart = base is not None and len(others) == len(inputs)
    rule = _TRANSLATIONS[name].base
    if name == "slerp":
        if base is None or len(others) != 1:
            raise RecipeError("slerp needs base_model and one other model")
        return [{"model": base}, *others], None
    if name == "karcher":
        return [*inputs, {"model": base}] if base_is_apart else inputs, None
    if rule == "refused":
        if base_is_apart:
            raise RecipeError(f"{name} takes no base_model beside its models")
        return inputs, None
    if base is None and rule == "needed":
        raise RecipeError(f"{name} needs base_model")
    return others, base


def _check_parameters(
    name: str, inputs: Sequence[Mapping[str, Any]], shared: Mapping[str, Any]
) -> None:
    """Refuse parameters that the method doesn't take, or doesn't take there."""
    allowed = _TRANSLATIONS[name].parameters
    places = [("parameters", shared, allowed)]
    places += [(entry["model"], _own(entry), allowed & {*_PER_MODEL}) for entry in inputs]
    for place, parameters, known in places:
        for key in parameters:
            if key not in known:
                raise RecipeError(f"{place} has {key!r}, which {name} doesn't take there")
    for key, value in _ONE_VALUE.items():
        if shared.get(key, value) != value:
            raise RecipeError(f"{key}: {shared[key]} is not supported")


def _own(entry: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a model's own parameters."""
    return entry.get("parameters") or {}


def _options(
    translation: _Translation, inputs: Sequence[Mapping[str, Any]], shared: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the method's options, but for ``normalize``."""
    options = dict(translation.fixed)
    for key, option in translation.options.items():
        values = [
            scoped(_own(entry).get(key), shared.get(key), _DEFAULTS.get(key)) for entry in inputs
        ]
        if any(value != values[0] for value in values):
            options[option] = {"each": values}
        elif values[0] is not None:
            options[option] = values[0]
    if translation.rescale and shared.get("rescale", True) is False:
        options["rescale"] = "none"
    return options


def _weights(
    name: str, inputs: Sequence[Mapping[str, Any]], shared: Mapping[str, Any]
) -> list[PerTensor]:
    """Return the weight of each model: 1, if the method takes none."""
    if not _TRANSLATIONS[name].weight:
        return [1.0] * len(inputs)
    weights = []
    for entry in inputs:
        weight = scoped(_own(entry).get("weight"), shared.get("weight"))
        if weight is None or (isinstance(weight, Mapping) and "*" not in weight):
            raise RecipeError(f"{entry['model']} has no weight, which {name} needs")
        weights.append(weight)
    return weights


def _normalized(weights: Sequence[PerTensor]) -> list[PerTensor]:
    if not all(isinstance(weight, (int, float)) for weight in weights) or abs(sum(weights)) < 1e-8:
        raise RecipeError(
            "normalize with weights by layer or filter, or of sum 0, is not supported without an "
            "election of signs"
        )
    return [weight / sum(weights) for weight in weights]
