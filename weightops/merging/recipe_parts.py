"""The recipes within a recipe, and the models that they name."""

from __future__ import annotations

from typing import TYPE_CHECKING

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


def only_stacks(recipe: Recipe) -> bool:
    """Return whether no two models of a recipe are merged with each other."""
    return all(len({*leaf.models, leaf.base} - {None}) == 1 for leaf in leaves_of(recipe))
