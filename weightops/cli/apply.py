"""``weightops apply``."""

from __future__ import annotations

from typing import Any

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
    "--strict",
    is_flag=True,
    help="Refuse a vector that was made from another base, instead of warning.",
)
@options.batchnorm
@options.output
@options.printing
def command(
    vectors: tuple[str, ...],
    base: str,
    alphas: tuple[float, ...],
    strict: bool,
    batchnorm: str | None,
    as_json: bool,
    **output: Any,
) -> None:
    """Write BASE + alpha * VECTOR (+ alpha * VECTOR ...), with vectors that `weightops vector` saved."""
    from weightops.hub.cards import edit_card, edit_title
    from weightops.support.atomic import check_free
    from weightops.task_vector import TaskVector

    if len(alphas) not in (1, len(vectors)):
        raise click.UsageError(
            f"there are {len(vectors)} vectors and {len(alphas)} alphas: give one alpha, or one for each vector"
        )
    check_free(output["out"], overwrite=output["overwrite"])
    alphas = alphas * len(vectors) if len(alphas) == 1 else alphas
    scaled = [TaskVector.load(path) * alpha for path, alpha in zip(vectors, alphas, strict=True)]
    edited = sum(scaled[1:], scaled[0]).apply(base, strict=strict)
    terms = list(zip(vectors, alphas, strict=True))
    edited.card = edit_card(base, terms)
    if batchnorm and not output["dry_run"]:
        from weightops.evaluation.batchnorm import recompute_batchnorm

        edited = recompute_batchnorm(edited, batchnorm, device=output["device"])
    options.save(edited, edit_title(base, terms), as_json, **output)
