"""Make the statistics that a recipe asks for, those of its files aside."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from weightops.algebra.names import PerTensor
from weightops.checkpoints.checkpoint import Checkpoint
from weightops.errors import RecipeError

Given = Sequence[Mapping[str, Any]]


def made_statistics(
    models: Sequence[str],
    given: Given | None,
    weights: Sequence[PerTensor] | None,
    options: Mapping[str, Any],
    open_model: Callable[[str], Checkpoint],
) -> list[dict[str, Checkpoint]] | None:
    """Return each model's statistics: the recipe's files, and those that are made now.

    Args:
        models: the refs of the models.
        given: for each model, kind -> a ref, or the arguments of `collect`. With ``after: merged``,
            Gram matrices are of the inputs that the layers merged so far give.
        weights: the weights of the merge.
        options: the options of the method.
        open_model: opens what a ref names.

    Raises:
        RecipeError: if only some Gram matrices are made after the merged layers.
    """
    if given is None:
        return None
    from weightops.merging.layer_by_layer import collect_layer_by_layer
    from weightops.statistics.collect import collect

    after = [_is_after_merged(statistics) for statistics in given]
    if any(after):
        grams = [dict(statistics["gram"]) for statistics in given] if all(after) else []
        tasks = [gram.pop("task", None) for gram in grams if gram.pop("after", None)]
        if not grams or any(gram != grams[0] for gram in grams) or None in tasks:
            raise RecipeError(
                "after: merged is for all models of a recipe, each with a task and the same images"
            )
        opened = list(map(open_model, models))
        made = collect_layer_by_layer(opened, tasks, weights=weights, **grams[0], **options)
        return [{"gram": gram} for gram in made]
    return [
        {
            kind: collect(open_model(model), kind=kind, **source)  # type: ignore[arg-type]
            if isinstance(source, Mapping)
            else open_model(source)
            for kind, source in statistics.items()
        }
        for model, statistics in zip(models, given, strict=True)
    ]


def _is_after_merged(statistics: Mapping[str, Any]) -> bool:
    gram = statistics.get("gram")
    return isinstance(gram, Mapping) and "after" in gram
