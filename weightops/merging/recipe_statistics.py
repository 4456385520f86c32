"""Make the statistics that a recipe asks for, those of its files aside."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from weightops.algebra.names import PerTensor
from weightops.checkpoints.checkpoint import Checkpoint
from weightops.errors import RecipeError
from weightops.merging.yaml_lines import located
from weightops.tasks.table import as_task

Given = Sequence[Mapping[str, Any]]


def made_statistics(
    models: Sequence[str],
    given: Given | None,
    weights: Sequence[PerTensor] | None,
    options: Mapping[str, Any],
    open_model: Callable[[str], Checkpoint],
    lines: Mapping[str, str],
) -> list[dict[str, Checkpoint]] | None:
    """Return each model's statistics: the recipe's files, and those that are made now.

    Args:
        models: the refs of the models.
        given: for each model, kind -> a ref, or the arguments of `collect`. With ``after: merged``,
            Gram matrices are of the inputs that the layers merged so far give.
        weights: the weights of the merge.
        options: the options of the method.
        open_model: opens what a ref names.
        lines: the lines of a recipe's file, for messages.

    Raises:
        RecipeError: if only some Gram matrices are made after the merged layers.
    """
    if given is None:
        return None
    from weightops.merging.layer_by_layer import collect_layer_by_layer
    from weightops.statistics.collect import collect

    if any(map(_after_merged, given)):
        tasks, others = [], []
        for i, statistics in enumerate(given):
            gram = _after_merged(statistics)
            others.append({key: value for key, value in gram.items() if key != "task"})
            with located(lines.get(f"the gram of model {i + 1}", "")):
                if "task" not in gram or others[-1] != others[0]:
                    raise RecipeError(
                        "after: merged is for all models of a recipe, each with a task and the "
                        "same images"
                    )
                tasks.append(as_task(gram["task"]))
        how = {key: value for key, value in others[0].items() if key != "after"}
        opened = list(map(open_model, models))
        made = collect_layer_by_layer(opened, tasks, weights=weights, **how, **options)
        return [{"gram": gram} for gram in made]
    found: list[dict[str, Checkpoint]] = []
    for i, (model, statistics) in enumerate(zip(models, given, strict=True)):
        found.append({})
        for kind, source in statistics.items():
            with located(lines.get(f"the {kind} of model {i + 1}", "")):
                found[-1][kind] = (
                    collect(open_model(model), kind=kind, **source)  # type: ignore[arg-type]
                    if isinstance(source, Mapping)
                    else open_model(source)
                )
    return found


def _after_merged(statistics: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what says of which inputs a Gram matrix is, if layers are merged before it."""
    gram = statistics.get("gram")
    return gram if isinstance(gram, Mapping) and "after" in gram else {}
