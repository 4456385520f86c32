"""Recipes: a merge as a YAML file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any

import torch
import yaml

from weightops.algebra.dtypes import is_editable
from weightops.algebra.linear_form import LinearForm
from weightops.algebra.names import Each, PerTensor
from weightops.checkpoints.checkpoint import Checkpoint
from weightops.checkpoints.opening import CheckpointLike, open_checkpoint
from weightops.errors import RecipeError
from weightops.hub.cards import merge_card
from weightops.merging.layers import Layers, stack_layers
from weightops.merging.merge import merge
from weightops.merging.mergekit import looks_like_mergekit, translate
from weightops.merging.methods.table import METHODS
from weightops.support.registry import unknown

DTYPES = ("float64", "float32", "bfloat16", "float16")
_KEYS = ("method", "base", "models", "slices", "alpha", "options", "seed", "dtype", "batchnorm")
_EACH = "each"  # an option with one value for each model: {each: [0.2, 0.5]}
_MODEL_KEYS = ("model", "weight", "layers")


@dataclass(frozen=True)
class Recipe:
    """A merge: what `merging.merge` takes, and the dtype to write.

    Attributes:
        models: refs of what is merged.
        method: a name in `METHODS`.
        base: ref of what task vectors are taken from.
        weights: a number or `PerTensor` for each model, or None for 1 each.
        alpha: a number or `PerTensor`.
        options: the method's own.
        seed: of methods that draw.
        dtype: to write in; None for the models' own.
        batchnorm: a task on whose images running statistics are made anew, or None.
        layers: in a slice, which layers (from, to) of each model; the base's are those of the first.
        slices: recipes for groups of layers, from the first to the last, instead of all else.

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

    def __post_init__(self) -> None:
        METHODS[self.method].check(self.options)
        if self.dtype is not None and self.dtype not in DTYPES:
            raise unknown("dtype to write", self.dtype, DTYPES)

    @classmethod
    def read(cls, path: str | Path) -> Recipe:
        """Read a recipe, weightops' own or mergekit's.

        Raises:
            RecipeError: naming the file and what in it isn't understood.
        """
        try:
            content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise RecipeError(f"{path} can't be read: {error.strerror or error}") from error
        except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
            raise RecipeError(
                f"{path} is not valid YAML: {' '.join(str(error).split())}"
            ) from error
        if not isinstance(content, dict):
            raise RecipeError(
                f"{path} is not a recipe: it has no keys, such as {', '.join(_KEYS[:3])}"
            )
        try:
            return cls.of(translate(content) if looks_like_mergekit(content) else content)
        except RecipeError as error:
            raise RecipeError(f"{path}: {error}") from error

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> Recipe:
        """The recipe that a mapping with the keys of the YAML describes.

        Raises:
            RecipeError: for what it doesn't have or doesn't mean.
            UnknownNameError: for an unknown key, method or option, with the nearest.
        """
        _check_keys(content, _KEYS, "recipe key")
        if "slices" in content:
            return cls._stack(content)
        recipe = cls._of(content)
        if recipe.layers:
            raise RecipeError("layers are of a slice: write slices: with this recipe in it")
        return recipe

    @classmethod
    def _of(cls, content: Mapping[str, Any]) -> Recipe:
        """A recipe without slices, or one of them."""
        _check_keys(content, _KEYS, "recipe key")
        listed = content.get("models")
        if not isinstance(listed, list) or not listed:
            raise RecipeError(
                "a recipe needs models: a list of refs, each alone or as {model: ref, weight: number}"
            )
        models, weights, layers = [], [], []
        for entry in listed:
            entry = entry if isinstance(entry, dict) else {"model": entry}
            _check_keys(entry, _MODEL_KEYS, "key of a model")
            if not isinstance(entry.get("model"), str):
                raise RecipeError(f"{entry} names no model")
            models.append(entry["model"])
            weights.append(_numbers(entry.get("weight", 1.0), "weight"))
            layers += [_range(entry["layers"])] if "layers" in entry else []
        if len(layers) not in (0, len(models)):
            raise RecipeError("either each model of a slice says which layers, or none does")
        options = content.get("options") or {}
        if not isinstance(options, dict):
            raise RecipeError("options is a mapping of the method's options to values")
        options = {
            str(name): Each(value[_EACH])
            if isinstance(value, dict) and [*value] == [_EACH]
            else value
            for name, value in options.items()
        }
        return cls(
            tuple(models),
            str(content.get("method", "linear")),
            content.get("base"),
            tuple(weights) if any(weight != 1.0 for weight in weights) else None,
            _numbers(content.get("alpha", 1.0), "alpha"),
            options,
            int(_numbers(content.get("seed", 0), "seed")),
            content.get("dtype"),
            tuple(layers) or None,
            batchnorm=content.get("batchnorm"),
        )

    @classmethod
    def _stack(cls, content: Mapping[str, Any]) -> Recipe:
        """A recipe of slices."""
        beside = [key for key in content if key not in ("slices", "dtype")]
        pieces = content["slices"]
        if (
            beside
            or not isinstance(pieces, list)
            or not all(isinstance(piece, dict) for piece in pieces)
            or not pieces
        ):
            raise RecipeError(
                f"slices is a list of recipes, with nothing but dtype beside it; there is {beside or pieces!r}"
            )
        for key in ("dtype", "batchnorm", "slices"):
            if any(key in piece for piece in pieces):
                raise RecipeError(f"{key} is for the whole recipe, not for one of its slices")
        slices = tuple(cls._of(piece) for piece in pieces)
        lengths = [{stop - start for start, stop in piece.layers or ()} for piece in slices]
        if any(len(length) != 1 for length in lengths):
            raise RecipeError(
                "each model of a slice says which layers, equally many: {model: ref, layers: [0, 16]}"
            )
        models = tuple(dict.fromkeys(model for piece in slices for model in piece.models))
        return cls(models, "passthrough", dtype=content.get("dtype"), slices=slices)

    def to_dict(self) -> dict[str, Any]:
        """What `of` reads, without what is as by default."""
        if self.slices:
            return {
                "slices": [piece.to_dict() for piece in self.slices],
                **({"dtype": self.dtype} if self.dtype else {}),
            }
        weights, layers = (
            self.weights or (1.0,) * len(self.models),
            self.layers or (None,) * len(self.models),
        )
        models = []
        for model, weight, span in zip(self.models, weights, layers, strict=True):
            beside = {
                **({"weight": weight} if weight != 1.0 else {}),
                **({"layers": list(span)} if span else {}),
            }
            models.append({"model": model, **beside} if beside else model)
        options = {
            name: {_EACH: list(v)} if isinstance(v, Each) else v for name, v in self.options.items()
        }
        content = {
            "method": self.method,
            "base": self.base,
            "models": models,
            "alpha": self.alpha,
            "options": options,
            "seed": self.seed,
            "dtype": self.dtype,
            "batchnorm": self.batchnorm,
        }
        plain: dict[str, Any] = {
            "base": None,
            "alpha": 1.0,
            "options": {},
            "seed": 0,
            "dtype": None,
            "batchnorm": None,
        }
        return {
            key: value for key, value in content.items() if key not in plain or value != plain[key]
        }

    def to_yaml(self) -> str:
        """The recipe as YAML."""
        text: str = yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)
        return text

    def merge(self) -> Checkpoint:
        """The result, which knows its recipe and writes it to its metadata and card; lazy, if it needs no images."""
        merged = self._stacked() if self.slices else self._merged(self.models, self.base)
        merged.recipe = self.to_dict()
        merged.card = merge_card(self.method, self.models, self.base, self.to_yaml())
        merged = merged.to(getattr(torch, self.dtype)) if self.dtype else merged
        if self.batchnorm is None:
            return merged
        from weightops.evaluation.batchnorm import recompute_batchnorm

        return recompute_batchnorm(merged, self.batchnorm, device="cpu")

    def _merged(self, models: Sequence[CheckpointLike], base: CheckpointLike | None) -> Checkpoint:
        if self.dtype:  # which may bring together what isn't of one dtype
            opened = [
                open_checkpoint(model) for model in ([*models] if base is None else [*models, base])
            ]
            dtypes = {
                spec.dtype
                for model in opened
                for spec in model.specs.values()
                if is_editable(spec.dtype)
            }
            if len(dtypes) > 1:
                widest = reduce(torch.promote_types, dtypes)
                models = [model.to(widest) for model in opened[: len(models)]]
                base = None if base is None else opened[-1].to(widest)
        return merge(
            models,
            self.method,
            base=base,
            weights=self.weights,
            alpha=self.alpha,
            seed=self.seed,
            **self.options,
        )

    def _stacked(self) -> Checkpoint:
        parts, first = [], 0
        for i, piece in enumerate(self.slices):
            ends = {"first": first, "before": i == 0, "after": i == len(self.slices) - 1}

            def part(ref: str, span: tuple[int, int], ends: Mapping[str, Any] = ends) -> Checkpoint:
                opened = open_checkpoint(ref)
                return Checkpoint(
                    LinearForm.of(Layers(opened.source, *span, **ends)), opened.architecture
                )

            assert piece.layers is not None
            models = [part(ref, span) for ref, span in zip(piece.models, piece.layers, strict=True)]
            base = part(piece.base, piece.layers[0]) if piece.base else None
            parts.append(piece._merged(models, base))
            first += piece.layers[0][1] - piece.layers[0][0]
        return stack_layers(parts, [piece.layers[0] for piece in self.slices if piece.layers])


def _check_keys(content: Mapping[str, Any], known: Sequence[str], what: str) -> None:
    for key in content:
        if key not in known:
            raise unknown(what, str(key), known)


def _range(value: Any) -> tuple[int, int]:
    """A range of layers.

    Raises:
        RecipeError: if it isn't two whole numbers, the second larger.
    """
    if (
        not isinstance(value, (list, tuple))
        or len(value) != 2
        or not all(type(v) is int and v >= 0 for v in value)
        or value[1] <= value[0]
    ):
        raise RecipeError(f"layers are [from, to], counted from 0, without the last; not {value}")
    return value[0], value[1]


def _numbers(value: Any, what: str) -> PerTensor:
    """A setting of finite numbers."""
    if isinstance(value, dict):
        return {str(pattern): _numbers(inner, what) for pattern, inner in value.items()}
    if isinstance(value, list) and value:
        return [_numbers(inner, what) for inner in value]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise RecipeError(
            f"{what} is a number, a mapping of name patterns to numbers, or a list of numbers, not {value!r}"
        )
    return float(value)
