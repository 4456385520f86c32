"""Translate mergekit's YAML into a recipe for the same merge.

What mergekit 0.1.5 ignores is ignored, with a warning that says where it stands. What it refuses is
refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from weightops.errors import RecipeError
from weightops.merging.mergekit_checks import check_kinds, layer_range
from weightops.merging.mergekit_methods import TRANSLATIONS, Translation
from weightops.merging.mergekit_parameters import Models, Reader, methods_options, methods_weights
from weightops.merging.mergekit_values import flag, whole
from weightops.merging.yaml_lines import LinedDict, LinedList, line_of, lines_of, located
from weightops.support.registry import unknown

_TOP = (
    *("merge_method", "models", "slices", "modules", "base_model", "parameters", "dtype"),
    *("out_dtype", "tokenizer_source", "tokenizer", "chat_template", "name"),
)
_ITS_OWN = ("merge_method", "parameters", "out_dtype", "tokenizer_source")
_SLICE = ("sources", "parameters", "base_model")
_MODULE = ("slices", "models", "parameters")


def looks_like_mergekit(content: Mapping[str, Any]) -> bool:
    """Return True for a mapping with keys that only mergekit has."""
    return any(key in content for key in _ITS_OWN)


def translate(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the recipe for the merge that a configuration of mergekit 0.1.5 describes.

    Raises:
        RecipeError: for what mergekit refuses, with the line where it is known.
        UnknownNameError: for a method that isn't supported.
    """
    check_kinds(content)
    return _Document(content).recipe()


class _Document:
    """A configuration of mergekit.

    Args:
        content: the configuration, whose mappings may know their lines.
    """

    def __init__(self, content: Mapping[str, Any]) -> None:
        self.content, self.reader = content, Reader()
        if content.get("merge_method") is None:
            first = next(key for key in _ITS_OWN if key in content)
            with located(line_of(content, first)):
                raise RecipeError(f"a recipe with {first} is one of mergekit's: no merge_method")
        with located(line_of(content, "merge_method")):
            name = content["merge_method"]
            if name not in TRANSLATIONS:
                raise unknown("merge method of mergekit's", str(name), TRANSLATIONS)
            self.name: str = name
        self.translation: Translation = TRANSLATIONS[name]
        self.base = self._reference(content, "base_model")

    def recipe(self) -> dict[str, Any]:
        """Return the recipe."""
        content = self.content
        self.reader.check_keys(content, _TOP, "the top level")
        parts = [key for key in ("models", "slices", "modules") if key in content]
        given = [key for key in parts if content[key]]
        with located(line_of(content, (given or parts or ["merge_method"])[-1])):
            if len(given) != 1:
                raise RecipeError("exactly one of models, slices and modules must be there")
        recipe = self._modules() if given == ["modules"] else self._body(content, [])
        tokenizer = self._tokenizer(recipe)
        dtype = str(content.get("out_dtype") or content.get("dtype") or "")
        settings = {
            "like": None if self.base in (None, _start_of(recipe)) else self.base,
            "dtype": dtype.removeprefix("torch."),
            "tokenizer": tokenizer,
            "chat_template": content.get("chat_template"),
            "name": None if content.get("name") is None else str(content["name"]),
        }
        written = lines_of(content)
        lines: dict[str, int] = {}
        for key in settings:
            for old in (key, f"out_{key}", f"{key}_source"):
                if old in written:
                    lines[key] = written[old]
        lines["like"] = written.get("base_model", 0)
        present = {key: value for key, value in settings.items() if value}
        return LinedDict({**recipe, **present}, {**lines_of(recipe), **lines})

    def _modules(self) -> dict[str, Any]:
        """Translate ``modules``: each is a part of the model, with slices or models of its own."""
        modules = self.content["modules"]
        bodies = LinedDict((), lines_of(modules))
        for name, module in modules.items():
            with located(line_of(modules, name)):
                self.reader.check_keys(module, _MODULE, f"the module {name}")
                if bool(module.get("slices")) == bool(module.get("models")):
                    raise RecipeError(f"the module {name} needs either slices or models")
                bodies[name] = self._body(module, [module.get("parameters")])
        return bodies["default"] if list(bodies) == ["default"] else {"modules": bodies}

    def _body(self, content: Mapping[str, Any], scopes: list[Any]) -> dict[str, Any]:
        """Translate models or slices."""
        self.reader.check_shared([*scopes, self.content.get("parameters")], self.translation)
        if content.get("models"):
            return self._merge(self._entries(content, "models"), self.base, scopes)
        slices = content["slices"]
        if len(slices) == 1 and not any("layer_range" in s for s in slices[0].get("sources") or ()):
            return self._slice(slices[0], scopes, 0)
        pieces, first = LinedList((), lines_of(slices)), 0
        for i, piece in enumerate(slices):
            with located(line_of(slices, i)):
                pieces.append(self._slice(piece, scopes, first))
                first += _length(piece)
        return {"slices": pieces}

    def _slice(self, piece: Mapping[str, Any], scopes: list[Any], first: int) -> dict[str, Any]:
        """Translate a slice, whose first layer has a new number."""
        self.reader.check_keys(piece, _SLICE, "a slice")
        self.reader.check_shared([piece.get("parameters")], self.translation)
        entries = self._entries(piece, "sources")
        base = self._reference(piece, "base_model") or self.base
        spans = [layer_range(entry) for entry in entries]
        given = [piece.get("parameters"), *scopes]
        recipe = self._merge(entries, base, given, first=first)
        if any(spans):
            span_of = dict(zip((entry["model"] for entry in entries), spans, strict=True))
            for entry in recipe["models"]:
                entry["layers"] = span_of[entry["model"]]
            span = span_of.get(recipe.get("base"))
            if span is not None and span != spans[0]:
                recipe["base_layers"] = span
        return recipe

    def _entries(self, content: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
        """Return the models of a list, with their references as text."""
        known = ("model", "parameters", *(("layer_range",) if key == "sources" else ()))
        entries = content.get(key)
        if not isinstance(entries, list) or not all(isinstance(e, Mapping) for e in entries):
            raise RecipeError(f"{key} is a list of mappings, each with a model")
        read: list[Mapping[str, Any]] = []
        for i, entry in enumerate(entries):
            with located(line_of(entries, i)):
                lined = LinedDict(entry, lines_of(entry))
                lined["model"] = self._reference(entry, "model")
                if not lined["model"]:
                    raise RecipeError(f"an entry of {key} names no model")
                if any(lined["model"] == other["model"] for other in read):
                    raise RecipeError(
                        f"{lined['model']} is there twice, which mergekit refuses, too",
                        hint="a recipe of weightops, see --print-recipe, may name a model twice",
                    )
                self.reader.check_keys(entry, known, f"{lined['model']}")
                self.reader.check_own(lined, self.translation, lined["model"] == self.base)
                read.append(lined)
        return read

    def _merge(
        self,
        entries: list[Mapping[str, Any]],
        base: str | None,
        scopes: Sequence[Any],
        *,
        first: int | None = None,
    ) -> dict[str, Any]:
        """Translate the merge of some models, or of layers of them, the first of a new number."""
        models, base = self._split_base(entries, base, in_slice=first is not None)
        if not models:  # there are no task vectors to add
            return {"method": "passthrough", "models": [LinedDict({"model": entries[0]["model"]})]}
        scopes = [*scopes, self.content.get("parameters")]
        shifts = [(first or 0) - _start(entry) for entry in models]
        given = Models(self.name, self.translation, models, scopes, shifts, self.reader)
        with located(line_of(self.content, "merge_method")):
            method, options = methods_options(given)
            weights = methods_weights(given)
        listed = []
        for entry, weight in zip(models, weights, strict=True):
            item = {"model": entry["model"], "weight": weight}
            lines = {**lines_of(entry.get("parameters")), **lines_of(entry)}
            listed.append(LinedDict(item, lines))
        recipe = {"method": method, "models": listed, "options": options}
        top = lines_of(self.content)
        lines = {"method": top.get("merge_method", 0), "base": top.get("base_model", 0)}
        lines["alpha"] = max(lines_of(scope).get("lambda", 0) for scope in scopes)
        if base is None:
            return LinedDict(recipe, lines)
        takes_lambda = self.translation.takes_lambda
        alpha = given.shared("lambda", default=1.0) if takes_lambda else 1.0
        return LinedDict(recipe | {"base": base, "alpha": alpha}, lines)

    def _split_base(
        self, entries: list[Mapping[str, Any]], base: str | None, *, in_slice: bool
    ) -> tuple[list[Mapping[str, Any]], str | None]:
        """Return the models that weightops merges, and the base that it takes task vectors from."""
        name, rule = self.name, self.translation.base
        others = [entry for entry in entries if entry["model"] != base]
        with located(line_of(self.content, "base_model") or line_of(self.content, "merge_method")):
            if base is None and rule in ("first", "needed"):
                raise RecipeError(f"{name} needs base_model")
            wanted = self.translation.others
            if wanted not in (None, len(others)):
                count = {1: "one model", 2: "two models"}[wanted]
                beside = "" if rule == "optional" else "base_model and "
                raise RecipeError(f"{name} takes {beside}{count}; here are {len(others)} beside it")
            fewest = self.translation.fewest
            if len(others) < fewest:
                raise RecipeError(f"{name} takes base_model and at least {fewest} models beside it")
            if rule == "first":
                own = [entry for entry in entries if entry["model"] == base]
                return [*(own or [LinedDict({"model": base})]), *others], None
            if rule == "ordinary":
                apart = base is not None and len(others) == len(entries) and not in_slice
                models = [*entries, LinedDict({"model": base})] if apart else entries
                if name == "passthrough" and len(models) > 1:
                    raise RecipeError("passthrough takes one model, and here are several")
                return models, None
        return others, base

    def _tokenizer(self, recipe: Mapping[str, Any]) -> dict[str, Any] | None:
        """Translate ``tokenizer_source`` and ``tokenizer``."""
        content = self.content
        source, given = content.get("tokenizer_source"), content.get("tokenizer")
        with located(line_of(content, "tokenizer")):
            if source and given is not None:
                raise RecipeError("tokenizer_source and tokenizer can't both be there")
        if given is None and not source:
            return None
        given = LinedDict({"source": source}) if given is None else given
        with located(line_of(content, "tokenizer") or line_of(content, "tokenizer_source")):
            known = ("source", "tokens", "pad_to_multiple_of")
            self.reader.check_keys(given, known, "tokenizer")
            tokenizer: dict[str, Any] = {"source": self._reference(given, "source") or "union"}
            if self.base is not None and recipe.get("base") != self.base:
                tokenizer["base"] = self.base
            if given.get("pad_to_multiple_of"):
                key = "pad_to_multiple_of"
                tokenizer[key] = whole(given[key], key)
            if given.get("tokens"):
                tokenizer["tokens"] = self._tokens(given["tokens"])
        return tokenizer

    def _tokens(self, tokens: Mapping[str, Any]) -> dict[str, Any]:
        translated = LinedDict((), lines_of(tokens))
        for token, entry in tokens.items():
            with located(line_of(tokens, token)):
                self.reader.check_keys(entry, ("source", "force"), f"the token {token}")
                source = entry.get("source")
                if isinstance(source, Mapping) and source.get("kind") is not None:
                    source = {key: value for key, value in source.items() if value is not None}
                    if source["kind"] == "model_token":
                        source["model"] = self._reference(source, "model")
                    if "token_id" in source:
                        source["token_id"] = whole(source["token_id"], "token_id")
                elif source is not None:
                    source = self._reference(entry, "source")
                force = flag(entry.get("force", False), "force")
                translated[token] = {"source": source, "force": force}
        return translated

    def _reference(self, content: Mapping[str, Any], key: str) -> str | None:
        """Return a reference to a model as text: ``path@revision+lora@revision``."""
        value = content.get(key)
        if value is None or isinstance(value, str):
            return value
        with located(line_of(content, key)):
            return self.reader.reference(value)


def _start_of(recipe: Mapping[str, Any]) -> str | None:
    """Return the model whose files a recipe's result has, if no key says it."""
    if "modules" in recipe:
        return None
    part = recipe["slices"][0] if "slices" in recipe else recipe
    start: str = part.get("base") or part["models"][0]["model"]
    return start


def _start(entry: Mapping[str, Any]) -> int:
    """Return the first layer that is taken from a model."""
    span = layer_range(entry)
    return span[0] if span else 0


def _length(piece: Mapping[str, Any]) -> int:
    """Return the number of layers of a slice; 0 if it has none, which is said later."""
    span = layer_range(piece["sources"][0])
    return span[1] - span[0] if span else 0
