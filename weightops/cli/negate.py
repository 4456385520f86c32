"""``weightops negate``."""

from __future__ import annotations

from typing import Any

import click

from weightops.cli import options
from weightops.cli.running import Run, check_training, given, go, running, searching


@click.command()
@click.option("--target", required=True, type=options.OneTask(), help="What to forget.")
@click.option(
    "--control",
    type=options.TaskNames(),
    default=None,
    help="What must be kept. Default: all rendered tasks.",
)
@click.option(
    "--control-threshold",
    type=click.FloatRange(0, 1),
    default=0.95,
    show_default=True,
    help="Share of the base's mean control accuracy to keep.",
)
@click.option(
    "--baselines",
    is_flag=True,
    help="Compare with a random vector of equal norms and with gradient ascent.",
)
@options.model
@searching
@given
@running("negated-TASK")
def command(target: str, run: Run, **settings: Any) -> None:
    """Make a model forget a task and keep others (task arithmetic, arXiv 2212.04089).

    Fine-tunes on the task, subtracts alpha times the task vector for one alpha after another, and takes the one with the
    least target accuracy on validation data that keeps the control tasks; ties go to the smaller alpha.
    """
    from weightops.workflows.negate import Negation

    check_training(settings)
    workflow = Negation(target, **settings)
    go(workflow, run, f"negated-{workflow.target.name}")
