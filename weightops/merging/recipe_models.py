"""Merge opened models by a recipe that has no slices or modules."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from weightops.algebra.names import Each, PerTensor, is_lines, matches
from weightops.algebra.source import Spec
from weightops.checkpoints.checkpoint import Checkpoint
from weightops.errors import RecipeError, WeightopsError
from weightops.merging.merge import merge
from weightops.merging.methods.table import METHODS
from weightops.merging.recipe_statistics import made_statistics
from weightops.merging.recipe_trial import try_values
from weightops.merging.yaml_lines import located
from weightops.support.text import first_few

if TYPE_CHECKING:
    from weightops.merging.recipe import Recipe

log = logging.getLogger("weightops")

_EXPERT = re.compile(r"\.experts\.\d+\.")


def merge_models(
    recipe: Recipe,
    models: Sequence[Checkpoint],
    base: Checkpoint | None,
    *,
    strict: bool,
    open_model: Callable[[str], Checkpoint],
) -> tuple[Checkpoint, Recipe]:
    """Merge models, and return the recipe without the patterns that match nothing.

    Args:
        recipe: the recipe.
        models: its models, opened.
        base: its base, opened.
        strict: refuse models that are configured differently, instead of warning.
        open_model: opens what else the recipe names by a ref.
    """
    if recipe.dtype or recipe.forgiving:
        models, base = _widened(models, base)
    if recipe.forgiving:
        recipe = _without_unmatched(recipe, (base or models[0]).specs)
    with _at_named_key(recipe):
        try_values(recipe)
        merged = merge(
            models,
            recipe.method,
            base=base,
            weights=recipe.weights,
            alpha=recipe.alpha,
            seed=recipe.seed,
            rank=recipe.rank,
            statistics=made_statistics(
                recipe.models,
                recipe.statistics,
                recipe.weights,
                recipe.options,
                open_model,
                recipe.lines,
            ),
            strict=strict,
            align=recipe.align,
            **recipe.options,
        )
    return merged, recipe


@contextmanager
def _at_named_key(recipe: Recipe) -> Iterator[None]:
    """Put the line of the key or pattern that an error names before it, or that of the method."""
    try:
        yield
    except WeightopsError as error:
        words = {"rank": ["rank"], "align": ["align"], "alpha": _patterns(recipe.alpha)}
        for name, value in recipe.options.items():
            words[f"option {name}"] = [name, *_patterns(value)]
        for model, weight in zip(recipe.models, recipe.weights or (), strict=False):
            words[f"the weight of {model}"] = _patterns(weight)
        named = (
            recipe.lines.get(key)
            for key, listed in words.items()
            if any(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", error.fact) for word in listed)
        )
        with located(next(filter(None, named), recipe.lines.get("method", ""))):
            raise


def _patterns(value: PerTensor) -> list[str]:
    """Return the patterns of names in a value, as messages quote them."""
    if isinstance(value, Each):
        return [pattern for item in value for pattern in _patterns(item)]
    return list(map(repr, value)) if isinstance(value, Mapping) and not is_lines(value) else []


def with_packed_experts(model: Checkpoint) -> Checkpoint:
    """Return a model with all experts of a layer in one tensor, where transformers has them so.

    mergekit 0.1.5 merges these tensors, so that thresholds and angles are of all experts together.
    """
    if model.form.space != "weights" or not any(_EXPERT.search(name) for name in model.specs):
        return model
    if model.names_in_memory is None:
        return model
    packed = model.memory
    used = {old for name in packed.specs for old in packed.files_of(name)}
    return Checkpoint(packed.form, model.architecture) if used >= set(model.specs) else model


def depends_on_packing(recipe: Recipe) -> bool:
    """Return whether it counts that all experts of a layer are one tensor, which has its own name.

    It doesn't where an element of the result depends on this element of the inputs only, and
    weights and options on no name.
    """

    def has_patterns(value: PerTensor) -> bool:
        if isinstance(value, Each):
            return any(map(has_patterns, value))
        return isinstance(value, Mapping) and not is_lines(value)

    method = METHODS[recipe.method]
    by_element = method.fixed or (method.kind == "chunks" and not method.computation.statistics)
    settings = [*(recipe.weights or ()), recipe.alpha, *recipe.options.values()]
    return not by_element or any(map(has_patterns, settings))


def _widened(
    models: Sequence[Checkpoint], base: Checkpoint | None
) -> tuple[Sequence[Checkpoint], Checkpoint | None]:
    """Return models and base in the widest of their dtypes, where they have several."""
    whole = [model for model in (*models, base) if model and model.form.space == "weights"]
    dtypes = {s.dtype_name for model in whole for s in model.specs.values() if s.is_editable}
    if len(dtypes) < 2:
        return models, base
    widest = "float64" if "float64" in dtypes else "float32"  # which holds both 16-bit formats
    widened = [m.to(widest) if m.form.space == "weights" else m for m in models]
    return widened, base.to(widest) if base else None


def _without_unmatched(recipe: Recipe, specs: Mapping[str, Spec]) -> Recipe:
    """Return a recipe without the patterns that match no tensor, and warn of these.

    Raises:
        RecipeError: for a value by patterns that leaves out a tensor.
    """
    unmatched: dict[str, None] = {}

    def pruned(value: PerTensor, name: str, line: str) -> Any:
        if isinstance(value, Each):
            return Each(pruned(item, name, line) for item in value)
        if not isinstance(value, Mapping) or is_lines(value):
            return value
        kept = {}
        for pattern, inner in value.items():
            if pattern == "*" or any(matches(pattern, name) for name in specs):
                kept[pattern] = inner
            else:
                unmatched[pattern] = None
        left = [
            name
            for name, spec in specs.items()
            if "*" not in kept
            and spec.is_editable
            and not any(matches(pattern, name) for pattern in kept)
        ]
        with located(recipe.lines.get(line, "")):
            if left:
                raise RecipeError(
                    f"no filter of {name} gives a value for {first_few(left)}",
                    hint="a last value without filter is that of all other tensors",
                )
        return kept["*"] if list(kept) == ["*"] else kept

    weights = recipe.weights
    if weights:
        names = [f"the weight of {ref}" for ref in recipe.models]
        weights = tuple(map(pruned, weights, names, names))
    result = replace(
        recipe,
        weights=weights,
        alpha=pruned(recipe.alpha, "lambda", "alpha"),
        options={
            name: pruned(value, name, f"option {name}") for name, value in recipe.options.items()
        },
    )
    for pattern in unmatched:
        text = re.sub(r"\[([*?[])\]", r"\1", pattern[1:-1])
        log.warning("no tensor matches the filter %s: it has no effect", text)
    return result
