"""``weightops add``."""

from __future__ import annotations

from typing import Any

import click

from weightops.cli import options
from weightops.cli.running import Run, check_training, given, go, running, searching


@click.command()
@click.option(
    "--tasks", required=True, type=options.TaskNames(), help="What to add, two tasks at least."
)
@click.option(
    "--method", default="sum", show_default=True, help="sum, or any of `weightops methods`."
)
@click.option(
    "--option",
    "pairs_of_options",
    multiple=True,
    metavar="NAME=VALUE",
    help="An option of the method, such as density=0.2.",
)
@click.option(
    "--each",
    is_flag=True,
    help="An alpha for each task, by coordinate search, instead of a shared one.",
)
@click.option(
    "--objective",
    type=click.Choice(["normalized", "mean", "worst"]),
    default="normalized",
    show_default=True,
    help="What the coefficients make best on validation data.",
)
@click.option("--pairs", is_flag=True, help="Every pair of the tasks, too.")
@click.option("--subsets", is_flag=True, help="Every subset of the tasks, too.")
@options.model
@searching
@given
@running("added-TASKS")
def command(
    tasks: tuple[str, ...],
    method: str,
    pairs_of_options: tuple[str, ...],
    run: Run,
    **settings: Any,
) -> None:
    """Put several tasks into one model: base + alpha * (the sum of their vectors), or of what a merge method makes of them.

    Normalized accuracy is accuracy over the fine-tuned model's own (task arithmetic, arXiv 2212.04089).
    """
    from weightops.merging.methods.table import METHODS
    from weightops.workflows.add import Addition

    check_training(settings)
    chosen = METHODS["task_arithmetic" if method == "sum" else method]
    texts = dict(pair.partition("=")[::2] for pair in pairs_of_options)
    values = options.of_method(chosen, texts)
    workflow = Addition(tasks, method=method, method_options=values, **settings)
    go(workflow, run, "-".join(["added", *(t.name for t in workflow.added)]))
