"""The recipes within a recipe, and the models that they name."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from weightops.checkpoints.opening import EMBEDDED
from weightops.checkpoints.quantised import DEQUANTIZED
from weightops.support.text import distinct_names

if TYPE_CHECKING:
    from weightops.merging.recipe import Recipe


def leaves_of(recipe: Recipe) -> list[Recipe]:
    """Return the recipes within a recipe that have models of their own."""
    inner = [*recipe.slices, *recipe.modules.values()]
    return [leaf for part in inner for leaf in leaves_of(part)] if inner else [recipe]


def refs_of(recipe: Recipe) -> list[str]:
    """Return the refs of all models of a recipe, the base first."""
    refs: dict[str, None] = {}
    for leaf in leaves_of(recipe):
        refs |= dict.fromkeys([*([leaf.base] if leaf.base else []), *leaf.models])
    return list(refs)


def place_of(ref: str, file: str) -> str:
    """Return where what a recipe's file names lies: here, in the file's folder, or beside that.

    What begins with ``./`` is looked for in the file's folder first.

    Args:
        ref: the ref in the recipe.
        file: the file; empty for a recipe without one.
    """
    kind = DEQUANTIZED if ref.startswith(DEQUANTIZED) else ""
    path = ref.removeprefix(kind)
    if not file or path == EMBEDDED:
        return ref
    folder = os.path.dirname(file)
    inside, beside = os.path.join(folder, path), os.path.join(folder, os.pardir, path)
    order = (inside, path, beside) if path.startswith("./") else (path, inside, beside)
    for place in map(os.path.normpath, order):
        if os.path.exists(place) or os.path.isfile(place.rpartition(":")[0]):
            return ref if place == os.path.normpath(path) else kind + place
    return ref


def recorded_names(recipe: Recipe) -> dict[str, str]:
    """Return ref -> the name that a result records for it, by the place where it lies."""
    places = {ref: place_of(ref, recipe.lines.get("file", "")) for ref in refs_of(recipe)}
    names = distinct_names(places.values())
    return {ref: names[place] for ref, place in places.items()}


def only_stacks(recipe: Recipe) -> bool:
    """Return whether no two models of a recipe are merged with each other."""
    return all(len({*leaf.models, leaf.base} - {None}) == 1 for leaf in leaves_of(recipe))
