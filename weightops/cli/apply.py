"""``weightops apply``."""

from __future__ import annotations

from pathlib import Path

import click

from weightops.cli import options


@click.command()
@click.argument("vectors", nargs=-1, required=True, metavar="VECTOR...")
@click.option("--base", required=True, help="What to edit.")
@click.option(
    "--alpha",
    "alphas",
    multiple=True,
    type=float,
    default=(1.0,),
    show_default=True,
    help="One coefficient for all vectors, or one for each; negative to forget.",
)
@click.option(
    "-o",
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    help="A .safetensors file, or a folder that loads where the base did.",
)
@click.option("--strict", is_flag=True, help="Refuse a vector that was made from another base, instead of warning.")
@click.option(
    "--out-dtype",
    type=click.Choice(["float64", "float32", "bfloat16", "float16"]),
    default=None,
    help="Default: the base's.",
)
@options.writing
@options.printing
def command(
    vectors: tuple[str, ...],
    base: str,
    alphas: tuple[float, ...],
    out: Path,
    strict: bool,
    out_dtype: str | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Write BASE + alpha * VECTOR (+ alpha * VECTOR ...), with vectors that `weightops vector` saved."""
    import torch

    from weightops.expression import provenance
    from weightops.files import check_free
    from weightops.task_vector import TaskVector

    if len(alphas) not in (1, len(vectors)):
        raise click.UsageError(
            f"there are {len(vectors)} vectors and {len(alphas)} alphas: give one alpha, or one for each vector"
        )
    check_free(out, overwrite=overwrite)
    scaled = [
        TaskVector.load(path) * alpha
        for path, alpha in zip(vectors, alphas * len(vectors) if len(alphas) == 1 else alphas, strict=True)
    ]
    edited = sum(scaled[1:], scaled[0]).apply(base, strict=strict)
    edited.save(out, overwrite=overwrite, dtype=getattr(torch, out_dtype) if out_dtype else None)
    if as_json:
        options.echo_json({"output": str(out), **provenance(edited.form)})
    else:
        click.echo(f"{out}: {edited!r}")
