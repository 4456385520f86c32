"""``weightops soup``."""

from __future__ import annotations

import click

from weightops.cli import options
from weightops.cli.running import Run, go, run_options


@click.command()
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@click.option(
    "--tasks",
    type=options.TaskNames(),
    default=None,
    help="What to measure on. Default: all rendered tasks.",
)
@click.option(
    "--recipe",
    type=click.Choice(["greedy", "uniform"]),
    default="greedy",
    show_default=True,
    help="See the text above.",
)
@click.option(
    "--base",
    default=None,
    help="A model whose configuration to use for weights that come without one.",
)
@options.batchnorm
@options.device
@run_options("soup")
def command(
    models: tuple[str, ...],
    tasks: tuple[str, ...] | None,
    recipe: str,
    base: str | None,
    batchnorm: str | None,
    device: str,
    run: Run,
) -> None:
    """Average models (model soups, arXiv 2203.05482).

    greedy: best first, each is taken in if mean validation accuracy strictly rises; uniform: all of them.
    """
    from weightops.checkpoints.checkpoint import Checkpoint
    from weightops.checkpoints.opening import open_checkpoint
    from weightops.workflows.soup import Soup

    opened = [open_checkpoint(model) for model in models]
    if opened[0].architecture is None and base is not None:
        opened[0] = Checkpoint(opened[0].form, open_checkpoint(base).architecture)
    workflow = Soup(opened, tasks=tasks, recipe=recipe, batchnorm=batchnorm, device=device)  # type: ignore[arg-type]
    go(workflow, run, "soup")
