"""``weightops merge``."""

from __future__ import annotations

from pathlib import Path

import click

from weightops.cli import options


@click.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": True})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="MODEL... [--OPTION VALUE]...")
@click.option("--method", default="linear", show_default=True, help="See `weightops methods`.")
@click.option("--base", default=None, help="What task vectors are taken from, for methods that work on them.")
@click.option("--weights", type=options.Alphas(), default=None, help="One number for each model. Default: 1 each.")
@click.option("--alpha", type=float, default=1.0, show_default=True, help="Coefficient of the merged task vector.")
@options.seed
@click.option(
    "-o",
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    help="A .safetensors file, or a folder that loads where the first did.",
)
@click.option(
    "--out-dtype",
    type=click.Choice(["float64", "float32", "bfloat16", "float16"]),
    default=None,
    help="Default: the models'.",
)
@options.writing
@options.printing
def command(
    arguments: tuple[str, ...], method: str, base: str | None, weights: tuple[float, ...] | None, alpha: float, seed: int, out: Path,
    out_dtype: str | None, overwrite: bool, as_json: bool,
) -> None:  # fmt: skip
    r"""Merge models into one, by any method; the method's own options go by their names.

    \b
    weightops merge node0 node1 node2 node3 -o merged
    weightops merge a b c --method ties --base pre --density 0.2 -o merged
    """
    import torch

    from weightops.expression import provenance
    from weightops.files import check_free
    from weightops.merging import merge
    from weightops.methods.table import METHODS

    check_free(out, overwrite=overwrite)
    models, settings = _split(arguments)
    chosen = METHODS[method]
    chosen.check(dict.fromkeys(settings))
    values = {}
    for name, text in settings.items():
        try:
            values[name] = chosen.options[name].type(text)
        except ValueError:
            raise click.UsageError(
                f"--{name.replace('_', '-')} of {method} is {chosen.options[name].type.__name__}, not {text!r}"
            ) from None
    merged = merge(models, method, base=base, weights=weights, alpha=alpha, seed=seed, **values)
    merged.save(out, overwrite=overwrite, dtype=getattr(torch, out_dtype) if out_dtype else None)
    if as_json:
        options.echo_json({"output": str(out), **provenance(merged.form)})
    else:
        click.echo(f"{out}: {method} of {len(models)} models, {len(merged)} tensors")


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
