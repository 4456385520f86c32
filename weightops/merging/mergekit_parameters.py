"""Read the parameters in mergekit's YAML: what they mean to a method, and which have no effect."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from weightops.algebra.names import PerTensor
from weightops.errors import RecipeError
from weightops.merging.mergekit_checks import layer_range
from weightops.merging.mergekit_methods import TRANSLATIONS, Translation
from weightops.merging.mergekit_values import renumbered, scoped
from weightops.merging.methods.table import METHODS
from weightops.merging.recipe_values import options_of
from weightops.merging.yaml_lines import line_of, located

log = logging.getLogger("weightops")

_EVERY_PARAMETER = {
    name for method in TRANSLATIONS.values() for name in method.for_all | method.for_one
} - {"int8_mask"}
_FRACTIONS = ("density", "gamma", "select_topk")
_YES = ("true", "1", "yes", "on", "y", "t")
_NO = ("false", "0", "no", "off", "n", "f")
_SILENT = ("int8_mask",)
"""Parameters that change how mergekit computes, never what."""


class Reader:
    """Checks of the keys of a configuration; each place is warned of once."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def _say(self, container: Any, key: str, fact: str) -> None:
        place = line_of(container, key)
        text = f"{place}: {fact}" if place else fact
        if text not in self._said:
            self._said.add(text)
            log.warning("%s", text)

    def check_keys(self, content: Mapping[str, Any], known: Sequence[str], where: str) -> None:
        """Warn of keys that mergekit doesn't know, and so ignores.

        Raises:
            RecipeError: if the content isn't a mapping.
        """
        if not isinstance(content, Mapping):
            raise RecipeError(f"{where} is a mapping, not {content!r}")
        for key in content:
            if key not in known:
                remedy = ""
                if key in _EVERY_PARAMETER:
                    remedy = "; under parameters: it would"
                elif key in ("dtype", "out_dtype", "tokenizer_source", "chat_template"):
                    remedy = "; at the top level it would"
                self._say(content, key, f"{key} at {where} has no effect{remedy}")

    def check_shared(self, scopes: Sequence[Any], translation: Translation) -> None:
        """Warn of parameters for all models that the method doesn't take."""
        for parameters in scopes:
            if parameters is not None and not isinstance(parameters, Mapping):
                raise RecipeError(f"parameters is a mapping, not {parameters!r}")
            for key in parameters or ():
                if key not in translation.for_all | translation.for_one and key not in _SILENT:
                    self._say(parameters, key, f"{key} has no effect in {translation.method}")

    def check_own(self, entry: Mapping[str, Any], translation: Translation, is_base: bool) -> None:
        """Warn of parameters of one model that the method doesn't take there."""
        parameters = entry.get("parameters") or {}
        if not isinstance(parameters, Mapping):
            raise RecipeError(f"parameters of {entry['model']} is a mapping, not {parameters!r}")
        for key in parameters:
            fact = f"{key} of {entry['model']} has no effect"
            if key in translation.for_all and key not in _SILENT:
                self._say(
                    parameters, key, f"{fact}; under parameters: of the whole recipe it would"
                )
            elif key not in translation.for_one and key not in _SILENT:
                self._say(parameters, key, f"{fact} in {translation.method}")
            elif is_base and translation.base in ("needed", "optional") and key not in _SILENT:
                self._say(parameters, key, f"{fact}: it is the base")

    def reference(self, value: Any) -> str:
        """Return a reference to a model that is a mapping as text.

        Raises:
            RecipeError: if it names no path.
        """
        if isinstance(value, str):
            return value
        if isinstance(value, Mapping) and ("path" in value or "model" in value):
            known = ("path", "revision", "lora", "model")
            self.check_keys(value, known, "the reference to a model")
            start = value["path"] if "path" in value else self.reference(value["model"])
            at = f"@{value['revision']}" if value.get("revision") else ""
            lora = f"+{self.reference(value['lora'])}" if value.get("lora") else ""
            return f"{start}{at}{lora}"
        raise RecipeError(
            f"{value!r} names no model", hint="a model is a path, or {path: ..., revision: ...}"
        )


class Models(NamedTuple):
    """The models of one merge, and the parameters of all of them, from the innermost scope."""

    name: str
    translation: Translation
    entries: Sequence[Mapping[str, Any]]
    scopes: Sequence[Mapping[str, Any] | None]
    shifts: Sequence[int] = ()
    """What is added to the number of a layer of each model, by which filters know its tensors."""

    def shared(self, key: str, default: Any = None) -> PerTensor:
        """Return the value of a parameter that all models share."""
        return scoped(*((scope or {}).get(key) for scope in self.scopes), default)

    def each(self, key: str) -> list[PerTensor]:
        """Return the value of a parameter for each model."""
        settings = [(scope or {}).get(key) for scope in self.scopes]
        default = self.translation.defaults.get(key)
        values = []
        for i, entry in enumerate(self.entries):
            scopes = [(entry.get("parameters") or {}).get(key), *settings]
            if self.shifts and self.shifts[i]:
                layers = range(*(layer_range(entry) or (0, 1000)))
                scopes = [renumbered(scope, self.shifts[i], layers) for scope in scopes]
            values.append(scoped(*scopes, default))
        return values

    def line(self, key: str) -> str:
        """Return the line of a parameter in its innermost scope."""
        return next((line_of(scope, key) for scope in self.scopes if scope and key in scope), "")


def methods_options(models: Models) -> tuple[str, dict[str, Any]]:
    """Return the method of weightops, and its options."""
    translation = models.translation
    method, options = translation.method, dict(translation.fixed)
    for key, option in translation.shared.items():
        value = models.shared(key, translation.defaults.get(key))
        with located(models.line(key)):
            if key in translation.required and _is_partial(value):
                raise RecipeError(f"{models.name} needs {key}", hint=f"parameters: {{{key}: 0.5}}")
            value = _checked(translation.method, option, key, value)
        if value is not None:
            options[option] = value
    for key, option in translation.each.items():
        values = models.each(key)
        for i, entry in enumerate(models.entries):
            with located(line_of(entry.get("parameters"), key) or models.line(key)):
                values[i] = _checked(translation.method, option, key, values[i])
        if any(value != values[0] for value in values):
            options[option] = {"each": [1.0 if value is None else value for value in values]}
        elif values[0] is not None:
            options[option] = values[0]
    if translation.normalize is not None:
        value = models.shared("normalize", translation.normalize)
        with located(models.line("normalize")):
            options["normalize"] = _chosen(value, translation.divisor, "normalize")
    if translation.rescale is not None:
        value = models.shared("rescale", translation.rescale)
        with located(models.line("rescale")):
            options["rescale"] = _chosen(value, ("none", "l1"), "rescale")
    for flag, variant in translation.variants.items():
        with located(models.line(flag)):
            if _flag(models.shared(flag, variant.default), flag) != variant.default:
                method, options = variant.method, options | dict(variant.options)
    known = METHODS[method].options
    return method, {key: value for key, value in options.items() if value != known[key].default}


def methods_weights(models: Models) -> list[PerTensor]:
    """Return the weight of each model: 1, if the method takes none.

    Raises:
        RecipeError: if the method takes weights and one isn't given for all tensors.
    """
    if not models.translation.weight:
        return [1.0] * len(models.entries)
    weights = models.each("weight")
    for entry, weight in zip(models.entries, weights, strict=True):
        if _is_partial(weight):
            with located(line_of(entry, "model")):
                raise RecipeError(f"{entry['model']} has no weight, which {models.name} needs")
    return weights


def _is_partial(value: PerTensor) -> bool:
    """Return whether a value isn't given, or not for all tensors."""
    return value is None or (isinstance(value, Mapping) and "*" not in value)


def _checked(method: str, option: str, key: str, value: PerTensor) -> PerTensor:
    """Return the value of a parameter, which the option of a method can have."""
    if value is None:
        return None
    _check_fraction(key, value)
    if isinstance(METHODS[method].options[option].default, bool):
        value = _chosen(value, (False, True), key)
    METHODS[method].check(options_of({option: value}))
    return value


def _check_fraction(key: str, value: Any) -> None:
    """Refuse a fraction that isn't from 0 to 1, at any tensor."""
    if isinstance(value, (Mapping, list)):
        for inner in value.values() if isinstance(value, Mapping) else value:
            _check_fraction(key, inner)
        return
    is_fraction = isinstance(value, (int, float)) and 0 <= value <= 1
    if key in _FRACTIONS and value is not None and not is_fraction:
        raise RecipeError(f"{key} is a fraction, from 0 to 1, not {value!r:.80}")


def _chosen(value: PerTensor, choices: tuple[Any, Any], name: str) -> PerTensor:
    """Return the choice for a flag, by tensor where the flag is."""
    if isinstance(value, Mapping):
        return {pattern: _chosen(inner, choices, name) for pattern, inner in value.items()}
    return choices[_flag(value, name)]


def _flag(value: Any, name: str) -> bool:
    """Return a truth value, which mergekit reads from 0, 1 and words such as "no", too."""
    word = str(int(value) if isinstance(value, float) and value in (0, 1) else value).lower()
    if word in _YES or word in _NO:
        return word in _YES
    raise RecipeError(f"{name} is true or false for all tensors, not {value!r:.80}")
