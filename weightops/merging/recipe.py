"""Recipes: a merge as a YAML file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from weightops.algebra.linear_form import LinearForm
from weightops.algebra.names import Each, PerTensor
from weightops.checkpoints.checkpoint import Checkpoint
from weightops.checkpoints.opening import CheckpointLike, open_checkpoint
from weightops.errors import RecipeError, WeightopsError
from weightops.hub.cards import merge_card
from weightops.merging.layers import Layers, stack_layers
from weightops.merging.merge import in_widest_dtype, merge
from weightops.merging.mergekit import looks_like_mergekit, translate
from weightops.merging.methods.table import METHODS
from weightops.support.registry import unknown

DTYPES = ("float64", "float32", "bfloat16", "float16")
_KEYS = (
    "method",
    "base",
    "models",
    "slices",
    "alpha",
    "options",
    "seed",
    "rank",
    "dtype",
    "batchnorm",
)
_MODEL_KEYS = ("model", "weight", "layers")
_EACH = "each"
"""The key of an option with one value for each model: ``{each: [0.2, 0.5]}``."""
_DEFAULTS: Mapping[str, Any] = {
    "base": None,
    "alpha": 1.0,
    "options": {},
    "seed": 0,
    "rank": None,
    "dtype": None,
    "batchnorm": None,
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
        layers: in a slice, the layers (from, to) of each model; the base's are those of the first.
        slices: recipes for groups of layers, from the first to the last, in place of all else.
        batchnorm: a task on whose images running statistics are recomputed, or None.
        rank: the most rank of an adapter that is merged of adapters, or None.

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
    slices: tuple[Recipe, ...] = ()
    batchnorm: str | None = None
    rank: int | None = None

    def __post_init__(self) -> None:
        METHODS[self.method].check(self.options)
        if self.dtype is not None and self.dtype not in DTYPES:
            raise unknown("dtype to write", self.dtype, DTYPES)

    @classmethod
    def read(cls, path: str | Path) -> Recipe:
        """Read a recipe, weightops' own or mergekit's.

        Raises:
            RecipeError: naming the file and what in it isn't understood.
            UnknownNameError: for an unknown key, method or option, with the nearest.
        """
        try:
            content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise RecipeError(f"{path} can't be read: {error.strerror or error}") from error
        except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
            reason = " ".join(str(error).split())
            raise RecipeError(f"{path} is not valid YAML: {reason}") from error
        if not isinstance(content, dict):
            raise RecipeError(
                f"{path} is not a recipe: it has no keys", hint=f"such as {', '.join(_KEYS[:3])}"
            )
        try:
            return cls.of(translate(content) if looks_like_mergekit(content) else content)
        except WeightopsError as error:
            raise error.prefixed(str(path)) from error

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> Recipe:
        """Return the recipe that a mapping with the keys of the YAML describes.

        Raises:
            RecipeError: for a value that its key can't have.
            UnknownNameError: for an unknown key, method or option, with the nearest.
        """
        _check_keys(content, _KEYS, "recipe key")
        if "slices" in content:
            return cls._of_slices(content)
        recipe = cls._of_models(content)
        if recipe.layers:
            raise RecipeError(
                "layers are of a slice", hint="make this recipe an entry of a list, slices:"
            )
        return recipe

    @classmethod
    def _of_models(cls, content: Mapping[str, Any]) -> Recipe:
        """Return a recipe without slices, or a slice."""
        _check_keys(content, _KEYS, "recipe key")
        listed = content.get("models")
        if not isinstance(listed, list) or not listed:
            raise RecipeError(
                "a recipe needs models",
                hint="models: is a list of refs, each alone or as {model: ref, weight: number}",
            )
        entries = [entry if isinstance(entry, dict) else {"model": entry} for entry in listed]
        for entry in entries:
            _check_keys(entry, _MODEL_KEYS, "key of a model")
            if not isinstance(entry.get("model"), str):
                raise RecipeError(f"{entry} names no model")
        weights = tuple(_numbers(entry.get("weight", 1.0), "weight") for entry in entries)
        layers = tuple(_layers(entry["layers"]) for entry in entries if "layers" in entry)
        if len(layers) not in (0, len(entries)):
            raise RecipeError("either each model of a slice has layers, or none")
        return cls(
            tuple(entry["model"] for entry in entries),
            str(content.get("method", "linear")),
            content.get("base"),
            weights if any(weight != 1.0 for weight in weights) else None,
            _numbers(content.get("alpha", 1.0), "alpha"),
            _options(content.get("options") or {}),
            int(_numbers(content.get("seed", 0), "seed")),
            content.get("dtype"),
            layers or None,
            batchnorm=content.get("batchnorm"),
            rank=int(_numbers(content["rank"], "rank")) if content.get("rank") else None,
        )

    @classmethod
    def _of_slices(cls, content: Mapping[str, Any]) -> Recipe:
        """Return a recipe of slices."""
        pieces = content["slices"]
        others = [key for key in content if key not in ("slices", "dtype")]
        listed = isinstance(pieces, list) and all(isinstance(piece, dict) for piece in pieces)
        if others or not listed or not pieces:
            raise RecipeError(
                "slices is a list of recipes, with no other key than dtype beside it; there is "
                f"{others or pieces!r}"
            )
        for key in ("dtype", "batchnorm", "slices"):
            if any(key in piece for piece in pieces):
                raise RecipeError(f"{key} is for the whole recipe, not for one of its slices")
        slices = tuple(cls._of_models(piece) for piece in pieces)
        for piece in slices:
            if len({stop - start for start, stop in piece.layers or ()}) != 1:
                raise RecipeError(
                    "each model of a slice has layers, equally many",
                    hint="such as {model: ref, layers: [0, 16]}",
                )
        models = tuple(dict.fromkeys(model for piece in slices for model in piece.models))
        return cls(models, "passthrough", dtype=content.get("dtype"), slices=slices)

    def to_dict(self) -> dict[str, Any]:
        """Return the mapping that `of` reads, without defaults."""
        if self.slices:
            dtype = {"dtype": self.dtype} if self.dtype else {}
            return {"slices": [piece.to_dict() for piece in self.slices], **dtype}
        content = {
            "method": self.method,
            "base": self.base,
            "models": self._model_entries(),
            "alpha": self.alpha,
            "options": {
                name: {_EACH: list(value)} if isinstance(value, Each) else value
                for name, value in self.options.items()
            },
            "seed": self.seed,
            "rank": self.rank,
            "dtype": self.dtype,
            "batchnorm": self.batchnorm,
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
        for model, weight, span in zip(self.models, weights, layers, strict=True):
            entry: dict[str, Any] = {"model": model}
            if weight != 1.0:
                entry["weight"] = weight
            if span:
                entry["layers"] = list(span)
            entries.append(entry if len(entry) > 1 else model)
        return entries

    def to_yaml(self) -> str:
        """Return the recipe as YAML."""
        text: str = yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)
        return text

    def merge(self) -> Checkpoint:
        """Merge the models; the result is lazy, unless it needs images.

        The recipe goes into the metadata and the model card of what is saved.
        """
        merged = self._stacked() if self.slices else self._merged(self.models, self.base)
        merged.recipe = self.to_dict()
        merged.card = merge_card(self.method, self.models, self.base, self.to_yaml())
        merged = merged.to(getattr(torch, self.dtype)) if self.dtype else merged
        if self.batchnorm is None:
            return merged
        from weightops.evaluation.batchnorm import recompute_batchnorm

        return recompute_batchnorm(merged, self.batchnorm, device="cpu")

    def _merged(self, models: Sequence[CheckpointLike], base: CheckpointLike | None) -> Checkpoint:
        if self.dtype:
            models, base = in_widest_dtype(models, base)
        return merge(
            models,
            self.method,
            base=base,
            weights=self.weights,
            alpha=self.alpha,
            seed=self.seed,
            rank=self.rank,
            **self.options,
        )

    def _stacked(self) -> Checkpoint:
        parts, spans, first = [], [], 0
        for i, piece in enumerate(self.slices):
            assert piece.layers is not None
            take = partial(
                _take_layers, first=first, before=i == 0, after=i == len(self.slices) - 1
            )
            models = [take(*pair) for pair in zip(piece.models, piece.layers, strict=True)]
            base = take(piece.base, piece.layers[0]) if piece.base else None
            parts.append(piece._merged(models, base))
            start, stop = piece.layers[0]
            spans.append((start, stop))
            first += stop - start
        return stack_layers(parts, spans)


def _take_layers(
    ref: str, span: tuple[int, int], *, first: int, before: bool, after: bool
) -> Checkpoint:
    """Open some layers of a model; the arguments are those of `Layers`."""
    model = open_checkpoint(ref)
    layers = Layers(model.source, *span, first=first, before=before, after=after)
    return Checkpoint(LinearForm.of(layers), model.architecture)


def _check_keys(content: Mapping[str, Any], known: Sequence[str], kind: str) -> None:
    for key in content:
        if key not in known:
            raise unknown(kind, str(key), known)


def _options(content: Any) -> dict[str, Any]:
    """Return a method's options, with `Each` where a value is one for each model."""
    if not isinstance(content, dict):
        raise RecipeError("options is a mapping of the method's options to values")
    return {
        str(name): Each(value[_EACH])
        if isinstance(value, dict) and list(value) == [_EACH]
        else value
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
