"""``weightops select``."""

from __future__ import annotations

from pathlib import Path

import click

from weightops.cli import options


@click.command()
@click.argument("vectors", nargs=-1, required=True, metavar="VECTOR...")
@click.option("--target", required=True, type=options.OneTask(), help="The task to be helped.")
@options.model
@click.option(
    "--labels",
    type=click.IntRange(0),
    default=None,
    help="How many labelled images of the target to use. Default: all.",
)
@click.option(
    "--steps",
    type=click.IntRange(1),
    default=20,
    show_default=True,
    help="Of the fine-tuning that the cosine is taken with.",
)
@click.option(
    "--truth",
    is_flag=True,
    help="Measure what each vector really gives on test data, and how well the order agrees.",
)
@options.seed
@options.device
@options.folder("Folder for table, picture and results.")
@options.printing
def command(
    vectors: tuple[str, ...],
    target: str,
    model: str,
    labels: int | None,
    steps: int,
    truth: bool,
    seed: int,
    device: str,
    out: Path | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Rank task vectors (or fine-tuned weights) by how much they can be expected to help a task."""
    from weightops.workflows.rank import select
    from weightops.workflows.soup import names_of

    named = dict(zip(names_of(list(vectors)), vectors, strict=True))
    outcome = select(
        named,
        target,
        out,
        model=model,
        labels=labels,
        steps=steps,
        truth=truth,
        overwrite=overwrite,
        device=device,
        seed=seed,
    )
    options.echo_json(outcome.record) if as_json else click.echo(outcome.text)
