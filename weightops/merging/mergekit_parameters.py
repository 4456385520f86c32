"""Read the parameters in mergekit's YAML: what they mean to a method, and which have no effect."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from weightops.algebra.names import PerTensor, is_lines
from weightops.errors import RecipeError
from weightops.merging.mergekit_checks import layer_range
from weightops.merging.mergekit_methods import TRANSLATIONS, Translation
from weightops.merging.mergekit_values import flag, mapped, number, renumbered, scoped
from weightops.merging.methods.table import METHODS
from weightops.merging.yaml_lines import LinedDict, line_of, lines_of, located

log = logging.getLogger("weightops")

_EVERY_PARAMETER = {
    name for method in TRANSLATIONS.values() for name in method.for_all | method.for_one
} - {"int8_mask"}
_FRACTIONS = ("density", "gamma", "select_topk")
_SILENT = ("int8_mask",)
"""Parameters that change how mergekit computes, never what."""


def _remedy(key: str) -> str:
    """Return where a key that isn't a parameter would have an effect, if that is clear."""
    if key in ("revision", "lora"):
        return "; in the reference to the model it would, as in model: path@revision+lora"
    top = ("dtype", "out_dtype", "tokenizer", "tokenizer_source", "chat_template")
    return "; at the top level it would" if key in top else ""


class Reader:
    """Checks of the keys of a configuration; each place is warned of once."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def say(self, container: Any, key: str, fact: str) -> None:
        """Warn of a fact about a key, with its line where it is known."""
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
                parameter = "; under parameters: it would" if key in _EVERY_PARAMETER else ""
                remedy = parameter or ("" if where == "the top level" else _remedy(key))
                self.say(content, key, f"{key} at {where} has no effect{remedy}")

    def check_shared(self, scopes: Sequence[Any], translation: Translation) -> None:
        """Warn of parameters for all models that the method doesn't take."""
        for parameters in scopes:
            if parameters is not None and not isinstance(parameters, Mapping):
                raise RecipeError(f"parameters is a mapping, not {parameters!r}")
            for key in parameters or ():
                if key not in translation.for_all | translation.for_one and key not in _SILENT:
                    fact = f"{key} has no effect in {translation.method}{_remedy(key)}"
                    self.say(parameters, key, fact)

    def check_own(self, entry: Mapping[str, Any], translation: Translation, is_base: bool) -> None:
        """Warn of parameters of one model that the method doesn't take there."""
        parameters = entry.get("parameters") or {}
        if not isinstance(parameters, Mapping):
            raise RecipeError(f"parameters of {entry['model']} is a mapping, not {parameters!r}")
        for key in parameters:
            fact = f"{key} of {entry['model']} has no effect"
            if key in translation.for_all and key not in _SILENT:
                self.say(parameters, key, f"{fact}; under parameters: of the whole recipe it would")
            elif key not in translation.for_one and key not in _SILENT:
                self.say(parameters, key, f"{fact} in {translation.method}")
            elif is_base and translation.base in ("needed", "optional") and key not in _SILENT:
                self.say(parameters, key, f"{fact}: it is the base")

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
    shifts: Sequence[int]
    """What is added to the number of a layer of each model, by which filters know its tensors."""
    reader: Reader

    def shared(
        self, key: str, read: Callable[[Any, str], Any] = number, default: Any = None
    ) -> PerTensor:
        """Return the value of a parameter that all models share."""
        option = self.translation.shared.get(key)
        if option is not None and key not in self.translation.required:
            default = METHODS[self.translation.method].options[option].default
        default = self.translation.defaults.get(key, default)
        with located(line_of(self.scope_of(key), key)):
            settings = [(scope or {}).get(key) for scope in self.scopes]
            value = scoped(*settings, default, read=lambda item: read(item, key))
            return self._checked(key, value, option, self.scope_of(key))

    def each(self, key: str) -> list[PerTensor]:
        """Return the value of a parameter for each model."""
        settings = [(scope or {}).get(key) for scope in self.scopes]
        default = self.translation.defaults.get(key)
        values = []
        for entry, shift in zip(self.entries, self.shifts, strict=True):
            own = entry.get("parameters") or {}
            scopes = [own.get(key), *settings]
            if shift:
                layers = range(*(layer_range(entry) or (0, 1000)))
                scopes = [renumbered(scope, shift, layers) for scope in scopes]
            scope = own if key in own else self.scope_of(key)
            with located(line_of(scope, key)):
                value = scoped(*scopes, default, read=lambda item: number(item, key))
                values.append(self._checked(key, value, self.translation.each.get(key), scope))
        return values

    def scope_of(self, key: str) -> Any:
        """Return the innermost parameters for all models that have a key."""
        return next((scope for scope in self.scopes if scope and key in scope), None)

    def _checked(self, key: str, value: PerTensor, option: str | None, scope: Any) -> PerTensor:
        """Return the value of a parameter, which the option of the method can have."""
        if key in _FRACTIONS and value is not None:
            value = self._fraction(key, value, scope)
        if option is not None and value is not None:
            METHODS[self.translation.method].check({option: value})
        return value

    def _fraction(self, key: str, value: PerTensor, scope: Any) -> PerTensor:
        """Return a fraction; one above 1 is 1 to mergekit.

        Raises:
            RecipeError: for a negative one, or a gradient that isn't from 0 to 1.
        """
        if isinstance(value, Mapping) and not is_lines(value):
            return {text: self._fraction(key, inner, scope) for text, inner in value.items()}
        gradient = value["lines"] if isinstance(value, Mapping) else None
        values = gradient or [value]
        if min(values) < 0 or (gradient and max(values) > 1):
            raise RecipeError(f"{key} is a fraction, from 0 to 1, not {gradient or value}")
        if values[0] <= 1:
            return value
        self.reader.say(scope, key, f"{key} {value:g} counts as 1: it is a fraction")
        return 1.0


def methods_options(models: Models) -> tuple[str, Mapping[str, Any]]:
    """Return the method of weightops, and its options, which know their lines.

    Raises:
        RecipeError: for a value that a parameter can't have, or a parameter that isn't given.
    """
    translation = models.translation
    options = dict(translation.fixed)
    for key, option in translation.shared.items():
        value = models.shared(key)
        if value is not None:
            options[option] = value
        elif key in translation.required:
            raise RecipeError(f"{models.name} needs {key}", hint=f"parameters: {{{key}: 0.5}}")
    for key, option in translation.each.items():
        values = models.each(key)
        same = all(value == values[0] for value in values)
        options[option] = values[0] if same else {"each": values}
    for key, (default, option, choices) in translation.flags.items():
        value = models.shared(key, flag, default)
        options[option] = mapped(value, choices.__getitem__)
    method = translation.method
    if translation.by_rows and options["whole"] is not True:
        method = translation.by_rows
    elif "along" in options and options["along"] != "last":
        scope, fact = models.scope_of("nuslerp_row_wise"), "without nuslerp_flatten: false"
        models.reader.say(scope, "nuslerp_row_wise", f"nuslerp_row_wise has no effect {fact}")
    known = METHODS[method].options
    lines = {
        option: lines_of(models.scope_of(key)).get(key, 0)
        for key, option in {**translation.shared, **translation.each}.items()
    }
    changed = {
        name: value
        for name, value in options.items()
        if name in known and value != known[name].default
    }
    return method, LinedDict(changed, lines)


def methods_weights(models: Models) -> list[PerTensor]:
    """Return the weight of each model: 1, if the method takes none.

    Raises:
        RecipeError: if the method takes weights and one isn't given.
    """
    if not models.translation.weight:
        return [1.0] * len(models.entries)
    weights = models.each("weight")
    for entry, weight in zip(models.entries, weights, strict=True):
        if weight is None:
            with located(line_of(entry, "model")):
                raise RecipeError(f"{entry['model']} has no weight, which {models.name} needs")
    return weights
