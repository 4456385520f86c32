"""``weightops merge``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from weightops.cli.borrowing import taken
from weightops.cli.from_signature import Borrowed, command
from weightops.cli.method_options import read_method_options
from weightops.cli.printing import echo, echo_json
from weightops.cli.saving import OUTPUT, SAVE, may_exist, output_options, save

if TYPE_CHECKING:
    from weightops.evaluation.batchnorm import BatchNorm
    from weightops.merging.methods.method import Method
    from weightops.merging.recipe import Recipe

_STATED = (
    "method",
    "base",
    "weights",
    "alpha",
    "seed",
    "rank",
    "statistics",
    "batchnorm",
    "dequantize",
    "align",
)
_UNKNOWN_OPTIONS = {"ignore_unknown_options": True, "allow_interspersed_args": True}
_ARGUMENTS = click.Argument(
    ["arguments"],
    nargs=-1,
    type=click.UNPROCESSED,
    metavar="RECIPE.yaml | MODEL... [--OPTION VALUE]...",
)
_PRINT_RECIPE = click.Option(
    ["--print-recipe"],
    is_flag=True,
    is_eager=True,
    help="Print the recipe that this is, and do nothing.",
)


@command(
    Borrowed("weightops.merging.merge:merge", only=("base", "seed", "rank", "strict", "align")),
    SAVE,
    arguments=(_ARGUMENTS, _PRINT_RECIPE, *OUTPUT),
    settings=_UNKNOWN_OPTIONS,
)
def merge(
    *,
    method: str = "linear",
    weights: Sequence[float] | None = None,
    alpha: Sequence[float] | None = None,
    statistics: tuple[str, ...] = (),
    batchnorm: BatchNorm | None = None,
    dequantize: bool = False,
    json_: bool = False,
    **given: Any,
) -> None:
    """Merge models into one, by any method; the method's own options go by their names.

        weightops merge node0 node1 node2 node3 -o merged
        weightops merge a b c --method ties --base pre --density 0.2 -o merged
        weightops merge adapter1 adapter2 --weights 0.7,0.3 -o adapter
        weightops merge recipe.yaml -o merged
        torchrun --nproc-per-node 4 -m weightops merge recipe.yaml -o merged

    A recipe is weightops' own (see --print-recipe) or mergekit's.

    Args:
        method: the method, see `weightops methods`.
        weights: one number for each model. Default: 1 each.
        alpha: the coefficient of the merged task vector; several are spread over depth. Default: 1.
        statistics: for fisher and regmean, the file of each model's statistic, in the order of the
            models; see `weightops statistics`.
        batchnorm: recompute running statistics on the images of a task; base: keep the base's.
        dequantize: read quantised models in bfloat16, as `dequantized:` before one does.
    """
    from weightops.support.atomic import check_free

    stated = {
        "method": method,
        "weights": weights,
        "alpha": alpha or (1.0,),
        "statistics": statistics,
        "batchnorm": batchnorm,
        "dequantize": dequantize,
        **taken(given, ("base", "seed", "rank", "align")),
    }
    recipe = _read_recipe(given.pop("arguments", ()), stated)
    if given.pop("print_recipe", False):
        echo_json(recipe.to_dict()) if json_ else echo(recipe.to_yaml(), nl=False)
        return
    how, output = taken(given, ("strict",)), output_options(given)
    if output.get("dry_run"):
        recipe = recipe.without_runs()
    else:
        check_free(output["out"], overwrite=may_exist(output))
    count = len(recipe.models)
    title = f"{'mixture' if recipe.mixture else recipe.method} of {count} model{'s' * (count > 1)}"
    merged = recipe.merge(device=output.get("device", "cpu"), **how)
    save(merged, title, json_, **output)


def _read_recipe(arguments: Sequence[str], stated: dict[str, Any]) -> Recipe:
    """Return the recipe of a file, or the one that the command line describes."""
    from weightops.merging.recipe import Recipe
    from weightops.merging.recipe_values import method_of

    models, texts = _split(arguments)
    if len(models) == 1 and models[0].endswith((".yaml", ".yml")):
        context = click.get_current_context()
        default = click.core.ParameterSource.DEFAULT
        extra = [n for n in _STATED if context.get_parameter_source(n) is not default]
        if extra or texts:
            named = ", ".join(f"--{name}" for name in [*extra, *texts])
            raise click.UsageError(f"the recipe says all of that: leave out {named}")
        return Recipe.read(models[0])
    alpha, files = stated.pop("alpha"), stated.pop("statistics")
    if stated.pop("dequantize"):
        from weightops.checkpoints.opening import as_dequantised

        models = list(map(as_dequantised, models))
        stated["base"] = stated.get("base") and as_dequantised(stated["base"])
    method = method_of(stated["method"])
    _check_spelling(texts, method.options)
    options = read_method_options(method, texts)
    single = alpha[0] if len(alpha) == 1 else list(alpha)
    return Recipe(
        tuple(models),
        alpha=single,
        options=options,
        statistics=_statistics(method, files, len(models)),
        **stated,
    )


def _check_spelling(given: Iterable[str], options: Iterable[str]) -> None:
    """Refuse options that are those of every merge, misspelt, unless they may be the method's."""
    own = [flag for p in click.get_current_context().command.params for flag in p.opts]
    of_method = [f"--{name.replace('_', '-')}" for name in options]
    for name in given:
        flag = f"--{name.replace('_', '-')}"
        near = get_close_matches(flag, own, n=1, cutoff=0.7)
        if near and not get_close_matches(flag, of_method, cutoff=0.7):
            raise click.NoSuchOption(flag, possibilities=near)


def _statistics(
    method: Method, files: Sequence[str], count: int
) -> tuple[dict[str, str], ...] | None:
    """Return each model's statistic by its kind, of which a method takes one."""
    if not files:
        return None
    if not method.statistics:
        raise click.UsageError(f"{method.name} takes no statistics: leave out --statistics")
    if len(method.statistics) != 1:
        kinds = " and ".join(method.statistics)
        raise click.UsageError(f"--statistics is for methods that take one kind, not {kinds}")
    if len(files) != count:
        example = " ".join(f"--statistics {model}.{method.statistics[0]}" for model in "AB")
        raise click.UsageError(
            f"there are {count} models, and --statistics names {len(files)}; it is repeated, once "
            f"for each model in their order: {example}"
        )
    return tuple({method.statistics[0]: file} for file in files)


def _check_model(name: str) -> None:
    """Refuse an option with one dash, and names that commas join, in place of a model."""
    if Path(name).exists():
        return
    if name.startswith("-"):
        meant = " Did you mean '--method'?" if name == "-m" else ""
        raise click.UsageError(f"No such option '{name}'.{meant}")
    if "," in name:
        apart = name.replace(",", " ")
        raise click.UsageError(
            f"there is no model {name}; several are separated by spaces: {apart}"
        )


def _split(arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Return the models, and the method's options by name."""
    models, texts = [], {}
    remaining = iter(arguments)
    for argument in remaining:
        if not argument.startswith("--"):
            _check_model(argument)
            models.append(argument)
            continue
        name, _, value = argument[2:].partition("=")
        value = value or next(remaining, "")
        if not value or value.startswith("--"):
            raise click.UsageError(f"{argument} needs a value")
        texts[name.replace("-", "_")] = value
    return models, texts
