"""``weightops analogy``."""

from __future__ import annotations

from typing import Any

import click

from weightops.cli import options
from weightops.cli.running import Run, check_training, given, go, running, searching


@click.command()
@click.option("--a", type=options.OneTask(), help="A is to B ...")
@click.option("--b", type=options.OneTask(), help="... as ...")
@click.option("--c", type=options.OneTask(), help="... C is to the target.")
@click.option(
    "--target",
    type=options.OneTask(),
    help="What has no training data; its validation images choose the coefficients.",
)
@click.option(
    "--shared", is_flag=True, help="One alpha for all three vectors, instead of one each."
)
@click.option("--supervised", is_flag=True, help="Compare with fine-tuning on the target.")
@options.model
@searching
@given
@running("analogy-TARGET")
def command(
    a: str | None,
    b: str | None,
    c: str | None,
    target: str | None,
    shared: bool,
    run: Run,
    **settings: Any,
) -> None:
    """Make a model for a task without training data: C + B - A (task analogies, arXiv 2212.04089).

    Without tasks, the built-in example: letters of two halves of the alphabet, in two styles. Trained on both styles of the first half
    and one of the second, the analogy reads the other style of the second half.
    """
    from weightops.workflows.analogy import Analogy
    from weightops.workflows.experiments import ANALOGY

    check_training(settings)
    tasks = (a, b, c, target)
    if any(tasks) and not all(tasks):
        raise click.UsageError(
            "name all of --a, --b, --c and --target, or none for the built-in example"
        )
    workflow = Analogy(*(ANALOGY if target is None else tasks), each=not shared, **settings)
    go(workflow, run, f"analogy-{workflow.d.name}")
