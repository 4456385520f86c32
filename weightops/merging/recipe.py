"""Recipes: a merge as a YAML file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from weightops.algebra.dtypes import EDITABLE
from weightops.algebra.names import Each, PerTensor
from weightops.checkpoints.checkpoint import Checkpoint
from weightops.errors import RecipeError
from weightops.merging.mergekit import looks_like_mergekit, translate
from weightops.merging.mergekit_mixture import looks_like_mixture, translate_mixture
from weightops.merging.methods.table import METHODS
from weightops.merging.mixture_choice import Mixture
from weightops.merging.recipe_content import (
    KEYS,
    WHOLE,
    check_pieces,
    in_file,
    merge_fields,
    mixture_fields,
    whole_fields,
    whole_lines,
)
from weightops.merging.recipe_merge import RecipeMerge
from weightops.merging.recipe_values import EACH, check_keys, method_of
from weightops.merging.tokenizer_choice import TokenizerChoice
from weightops.merging.yaml_lines import at, line_of, located, read_lined
from weightops.support.registry import unknown
from weightops.support.yaml_files import yaml_text

_DEFAULTS: Mapping[str, Any] = {
    "base": None,
    "alpha": 1.0,
    "options": {},
    "seed": 0,
    "rank": None,
    "align": False,
    "base_layers": None,
}


@dataclass(frozen=True)
class Recipe:
    """A merge: the arguments of `merge`, and the dtype to write.

    Attributes:
        models: the refs of the models.
        method: a name in `METHODS`.
        base: the ref of the model that task vectors are taken from.
        weights: a number or `PerTensor` for each model, or None for 1 each.
        alpha: a number or `PerTensor`.
        options: the method's own options.
        seed: the seed of methods that draw.
        dtype: the dtype to write; None for the models' own.
        layers: in a slice, the layers (from, to) of each model.
        base_layers: in a slice, the layers of the base; those of the first model by default.
        slices: recipes for groups of layers, from the first to the last, in place of all else.
        modules: part of the model -> the recipe for it, in place of all else.
        mixture: how the models become experts of one model, in place of a method.
        batchnorm: a task on whose images running statistics are recomputed, "base" to keep the
            base's, or None.
        tokenizer: the vocabulary to merge by token; None merges rows by their numbers.
        chat_template: "auto", the name of a chat template, or its text; None for the base's.
        fill_missing: the ref of the whole model that what is merged is a part of, or None.
        like: the ref of the model whose configuration, tokenizer and other files the result has; by
            default the base's, or the first model's.
        name: what the merge is called, by which recipes beside it may refer to it.
        named: name -> a recipe that this one may name as a model.
        packed_experts: merge all experts of a layer as one tensor, where transformers has them so
            in memory; thresholds and angles are then of all of them, as in mergekit.
        forgiving: True for a recipe of mergekit's, which may have patterns that match no tensor.
        lines: model, token or key -> its line in the file, for messages.
        statistics: for each model, kind -> the ref of its statistic, or the arguments of `collect`
            that make it, such as ``{"task": "mnist"}``; None if there are none.
        rank: the most rank of an adapter that is merged of adapters, or None.
        align: permute the models' units to be like the base's or the first model's; see `merge`.

    >>> print(Recipe(("a", "b"), "ties", base="pre", options={"density": 0.2}).to_yaml(), end="")
    method: ties
    base: pre
    models:
    - a
    - b
    options:
      density: 0.2
    """

    models: tuple[str, ...]
    method: str = "linear"
    base: str | None = None
    weights: tuple[PerTensor, ...] | None = None
    alpha: PerTensor = 1.0
    options: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    dtype: str | None = None
    layers: tuple[tuple[int, int], ...] | None = None
    base_layers: tuple[int, int] | None = None
    slices: tuple[Recipe, ...] = ()
    modules: Mapping[str, Recipe] = field(default_factory=dict)
    mixture: Mixture | None = None
    batchnorm: str | None = None
    tokenizer: TokenizerChoice | None = None
    chat_template: str | None = None
    fill_missing: str | None = None
    like: str | None = None
    name: str | None = None
    named: Mapping[str, Recipe] = field(default_factory=dict)
    packed_experts: bool = False
    forgiving: bool = field(default=False, compare=False)
    lines: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)
    statistics: tuple[Mapping[str, Any], ...] | None = None
    rank: int | None = None
    align: bool = False

    def __post_init__(self) -> None:
        method_of(self.method).check(self.options)
        if self.dtype is not None and self.dtype not in EDITABLE:
            raise unknown("dtype to write", self.dtype, EDITABLE)

    def __repr__(self) -> str:
        entries = {f.name: getattr(self, f.name) for f in fields(self) if f.repr}
        unset = {f.name: f.default for f in fields(self)}
        given = [f"{name}={v!r}" for name, v in entries.items() if v and v != unset[name]]
        return f"Recipe({', '.join(given)})"

    @classmethod
    def read(cls, path: str | Path) -> Recipe:
        """Read a recipe, weightops' own or mergekit's.

        A file with several documents, each with a ``name``, is the recipe of the one without a
        name, or else of the last; it may name the others as models, in any order.

        Raises:
            RecipeError: naming the file, the line, and what in it isn't understood.
            UnknownNameError: for an unknown key, method or option, with the nearest.
        """
        documents = read_lined(Path(path))
        if not documents or not all(isinstance(document, dict) for document in documents):
            raise RecipeError(
                f"{path} is not a recipe: it has no keys", hint=f"such as {', '.join(KEYS[:3])}"
            )
        with in_file(str(path)):
            recipe = _joined([cls._of_document(document) for document in documents])
        return replace(recipe, lines={**recipe.lines, "file": str(path)})

    @classmethod
    def _of_document(cls, document: Mapping[str, Any]) -> Recipe:
        if looks_like_mixture(document):
            return cls.of(translate_mixture(document), forgiving=True)
        if looks_like_mergekit(document):
            return cls.of(translate(document), forgiving=True)
        return cls.of(document)

    @classmethod
    def of(cls, content: Mapping[str, Any], *, forgiving: bool = False) -> Recipe:
        """Return the recipe that a mapping with the keys of the YAML describes.

        Args:
            content: the mapping.
            forgiving: leave out patterns that match no tensor, with a warning.

        Raises:
            RecipeError: for a value that its key can't have.
            UnknownNameError: for an unknown key, method or option, with the nearest.
        """
        check_keys(content, KEYS, "recipe key")
        whole = {**whole_fields(content), "forgiving": forgiving}
        lines = whole_lines(content)
        named = content.get("named") or {}
        with at(content, "named"):
            if not isinstance(named, dict):
                raise RecipeError(f"named is {named!r:.80}, and must map names to recipes")
            whole["named"] = {name: cls.of(named[name], forgiving=forgiving) for name in named}
        if "mixture" in content:
            return cls._of_mixture(content, {**whole, "lines": lines})
        if "modules" in content:
            return cls._of_modules(content, {**whole, "lines": lines})
        if "slices" in content:
            return cls._of_slices(content, {**whole, "lines": lines})
        fields = merge_fields(content)
        if fields["layers"]:
            with at(content, "models"):
                raise RecipeError(
                    "layers are of a slice", hint="make this recipe an entry of a list, slices:"
                )
        return cls(**{**whole, **fields, "lines": {**lines, **fields["lines"]}})

    @classmethod
    def _of_mixture(cls, content: Mapping[str, Any], whole: Mapping[str, Any]) -> Recipe:
        """Return a recipe of a mixture of experts."""
        fields, lines = mixture_fields(content)
        return cls(**{**whole, **fields, "lines": {**whole["lines"], **lines}})

    @classmethod
    def _of_modules(cls, content: Mapping[str, Any], whole: Mapping[str, Any]) -> Recipe:
        """Return a recipe of the parts of a model."""
        parts, others = content["modules"], [k for k in content if k not in ("modules", *WHOLE)]
        if others or not isinstance(parts, dict) or not parts:
            with at(content, "modules"):
                what = "modules maps parts of a model to recipes, alone"
                raise RecipeError(f"{what}: {others or parts!r:.200}")
        modules = {}
        for name, part in parts.items():
            with at(parts, name):
                check_keys(part, [key for key in KEYS if key not in (*WHOLE, "modules")], "key")
                modules[str(name)] = cls.of(part, forgiving=whole["forgiving"])
                if modules[str(name)].align:
                    raise RecipeError("align is of whole models, not of a part of one")
        whole["lines"].update({f"modules {name}": line_of(parts, name) for name in parts})
        models = tuple(dict.fromkeys(m for part in modules.values() for m in part.models))
        return cls(models, "passthrough", modules=modules, **whole)

    @classmethod
    def _of_slices(cls, content: Mapping[str, Any], whole: Mapping[str, Any]) -> Recipe:
        """Return a recipe of slices."""
        pieces = content["slices"]
        with at(content, "slices"):
            check_pieces(pieces, [key for key in content if key not in ("slices", *WHOLE)])
        slices = []
        for i, piece in enumerate(pieces):
            with at(pieces, i):
                fields = merge_fields(piece)
                spans = fields["layers"] or ()
                if len({stop - start for start, stop in spans}) != 1:
                    raise RecipeError(
                        "each model of a slice has layers, equally many",
                        hint="such as {model: ref, layers: [0, 16]}",
                    )
                fields["lines"] = {**fields["lines"], "slice": line_of(pieces, i)}
                slices.append(cls(**fields, forgiving=whole["forgiving"]))
        models = tuple(dict.fromkeys(model for piece in slices for model in piece.models))
        return cls(models, "passthrough", slices=tuple(slices), **whole)

    def to_dict(self) -> dict[str, Any]:
        """Return the mapping that `of` reads, without defaults."""
        whole = {
            "dtype": self.dtype,
            "batchnorm": self.batchnorm,
            "tokenizer": self.tokenizer and self.tokenizer.to_dict(),
            "chat_template": self.chat_template,
            "fill_missing": self.fill_missing,
            "like": self.like,
            "packed_experts": self.packed_experts,
            "name": self.name,
            "named": {name: recipe.to_dict() for name, recipe in self.named.items()},
        }
        return self._body() | {key: value for key, value in whole.items() if value}

    def _body(self) -> dict[str, Any]:
        if self.mixture:
            seed = {"seed": self.seed} if self.seed else {}
            return {"base": self.base, "mixture": self.mixture.to_dict(), **seed}
        if self.modules:
            return {"modules": {name: part.to_dict() for name, part in self.modules.items()}}
        if self.slices:
            return {"slices": [piece.to_dict() for piece in self.slices]}
        content = {
            "method": self.method,
            "base": self.base,
            "models": self._model_entries(),
            "base_layers": list(self.base_layers) if self.base_layers else None,
            "alpha": self.alpha,
            "options": {
                name: {EACH: list(value)} if isinstance(value, Each) else value
                for name, value in self.options.items()
            },
            "seed": self.seed,
            "rank": self.rank,
            "align": self.align,
        }
        return {
            key: value
            for key, value in content.items()
            if key not in _DEFAULTS or value != _DEFAULTS[key]
        }

    def _model_entries(self) -> list[str | dict[str, Any]]:
        count = len(self.models)
        weights, layers = self.weights or (1.0,) * count, self.layers or (None,) * count
        entries: list[str | dict[str, Any]] = []
        listed = zip(self.models, weights, layers, self.statistics or ({},) * count, strict=True)
        for model, weight, span, statistics in listed:
            entry: dict[str, Any] = {"model": model}
            if weight != 1.0:
                entry["weight"] = weight
            if span:
                entry["layers"] = list(span)
            if statistics:
                entry["statistics"] = dict(statistics)
            entries.append(entry if len(entry) > 1 else model)
        return entries

    @property
    def all_options(self) -> dict[str, Any]:
        """The values of all options of the method, and the seed; empty for a composition."""
        if self.mixture or self.modules or self.slices:
            return {}
        defaults = {name: option.default for name, option in METHODS[self.method].options.items()}
        return {**defaults, **self.options, "alpha": self.alpha, "seed": self.seed}

    def to_yaml(self) -> str:
        """Return the recipe as YAML."""
        return yaml_text(self.to_dict())

    def merge(self, *, strict: bool = False, device: str = "cpu") -> Checkpoint:
        """Merge the models; the result is lazy, unless it needs images.

        The recipe goes into the metadata and the model card of what is saved.

        Args:
            strict: refuse models that are configured differently, and vectors that were made from
                another base, instead of warning.
            device: where models are run, if images or the prompts of a mixture are needed.
        """
        return RecipeMerge(self, strict=strict, device=device).run()

    def without_runs(self) -> Recipe:
        """Return a recipe for a result of the same size, for which no model is run."""
        mixture = self.mixture and replace(self.mixture, gate_mode="random")
        return replace(self, batchnorm=None, mixture=mixture)


def _joined(recipes: list[Recipe]) -> Recipe:
    """Return the recipe of a file's documents, which has the others by their names."""
    if len(recipes) == 1:
        return recipes[0]
    unnamed = [recipe for recipe in recipes if recipe.name is None]
    if len(unnamed) > 1:
        with located(unnamed[1].lines.get("method", "")):
            raise RecipeError("of several recipes in a file, one at most has no name")
    last = unnamed[0] if unnamed else recipes[-1]
    named: dict[str, Recipe] = {}
    for recipe in recipes:
        if recipe is not last:
            if recipe.name in named:
                with located(recipe.lines.get("name", "")):
                    raise RecipeError(f"two recipes have the name {recipe.name}")
            named[str(recipe.name)] = recipe
    return replace(last, named={**last.named, **named})
