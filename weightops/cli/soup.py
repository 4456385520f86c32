"""``weightops soup``."""

from __future__ import annotations

from pathlib import Path

import click

from weightops.cli import options
from weightops.cli.running import go


@click.command()
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@click.option(
    "--tasks", type=options.TaskNames(), default=None, help="What to measure on. Default: all rendered tasks."
)
@click.option(
    "--recipe",
    type=click.Choice(["greedy", "uniform"]),
    default="greedy",
    show_default=True,
    help="See the text above.",
)
@click.option("--base", default=None, help="A model whose configuration to use for weights that come without one.")
@options.device
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    default=Path("soup"),
    show_default=True,
    help="Folder for the results.",
)
@click.option("--dry-run", is_flag=True, help="Say what would be done, and do nothing.")
@options.writing
@options.printing
def command(
    models: tuple[str, ...], tasks: tuple[str, ...] | None, recipe: str, base: str | None, device: str, out: Path, dry_run: bool, overwrite: bool,
    as_json: bool,
) -> None:  # fmt: skip
    """Average models (model soups, arXiv 2203.05482).

    greedy: best first, each is taken in if mean validation accuracy strictly rises; uniform: all of them.
    """
    from weightops.checkpoints.checkpoint import Checkpoint, open_checkpoint
    from weightops.soups import Soup

    opened = [open_checkpoint(model) for model in models]
    if opened[0].architecture is None and base is not None:
        opened[0] = Checkpoint(opened[0].form, open_checkpoint(base).architecture)
    workflow = Soup(opened, tasks=tasks, recipe=recipe, device=device)  # type: ignore[arg-type]
    go(workflow, out, resume=False, dry_run=dry_run, overwrite=overwrite, as_json=as_json)
