"""``weightops merge``."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import click

from weightops.cli import options


@click.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": True})
@click.argument(
    "arguments",
    nargs=-1,
    type=click.UNPROCESSED,
    metavar="RECIPE.yaml | MODEL... [--OPTION VALUE]...",
)
@click.option("--method", default="linear", show_default=True, help="See `weightops methods`.")
@click.option(
    "--base", default=None, help="What task vectors are taken from, for methods that work on them."
)
@click.option(
    "--weights",
    type=options.Alphas(),
    default=None,
    help="One number for each model. Default: 1 each.",
)
@click.option(
    "--alpha",
    type=options.Alphas(),
    default=(1.0,),
    help="Of the merged task vector; several are spread over depth. Default: 1.",
)
@options.seed
@options.batchnorm
@click.option(
    "--print-recipe",
    is_flag=True,
    is_eager=True,
    help="Print the recipe that this is, and do nothing.",
)
@options.output
@options.printing
def command(arguments: tuple[str, ...], print_recipe: bool, as_json: bool, **given: Any) -> None:
    """Merge models into one, by any method; the method's own options go by their names.

    \b
    weightops merge node0 node1 node2 node3 -o merged
    weightops merge a b c --method ties --base pre --density 0.2 -o merged
    weightops merge recipe.yaml -o merged
    torchrun --nproc-per-node 4 -m weightops merge recipe.yaml -o merged

    A recipe is weightops' own (see --print-recipe) or mergekit's.
    """
    from weightops.merging.recipe import Recipe
    from weightops.support.atomic import check_free

    stated = {
        name: given.pop(name)
        for name in ("method", "base", "weights", "alpha", "seed", "batchnorm")
    }
    models, settings = _split(arguments)
    if len(models) == 1 and models[0].endswith((".yaml", ".yml")):
        context = click.get_current_context()
        extra = [
            n
            for n in stated
            if context.get_parameter_source(n) is not click.core.ParameterSource.DEFAULT
        ]
        if extra or settings:
            raise click.UsageError(
                f"the recipe says all of that: leave out --{', --'.join([*extra, *settings])}"
            )
        recipe = Recipe.read(models[0])
    else:
        recipe = _recipe(models, settings, **stated)
    if print_recipe:
        if as_json:
            options.echo_json(recipe.to_dict())
        else:
            click.echo(recipe.to_yaml(), nl=False)
        return
    if given["dry_run"]:
        recipe = replace(recipe, batchnorm=None)
    else:
        check_free(given["out"], overwrite=given["overwrite"])
    options.save(
        recipe.merge(),
        f"{recipe.method} of {len(recipe.models)} model{'s' * (len(recipe.models) > 1)}",
        as_json,
        **given,
    )


def _recipe(
    models: list[str],
    settings: dict[str, str],
    *,
    method: str,
    weights: Any,
    alpha: tuple[float, ...],
    **rest: Any,
) -> Any:
    """The recipe that the command line describes."""
    from weightops.merging.methods.table import METHODS
    from weightops.merging.recipe import Recipe

    values = options.of_method(METHODS[method], settings)
    return Recipe(
        tuple(models),
        method,
        weights=weights,
        alpha=alpha[0] if len(alpha) == 1 else list(alpha),
        options=values,
        **rest,
    )


def _split(arguments: tuple[str, ...]) -> tuple[list[str], dict[str, str]]:
    """Models, and the method's options by name."""
    models, settings = [], {}
    rest = iter(arguments)
    for argument in rest:
        if not argument.startswith("--"):
            models.append(argument)
            continue
        name, _, value = argument[2:].partition("=")
        if not value:
            value = next(rest, "")
        if not value or value.startswith("--"):
            raise click.UsageError(f"{argument} needs a value")
        settings[name.replace("-", "_")] = value
    return models, settings
