"""``weightops patch``."""

from __future__ import annotations

from typing import Any

import click

from weightops.cli import options
from weightops.cli.running import Run, check_training, given, go, running, searching


@click.command()
@click.option(
    "--task",
    required=True,
    type=options.TaskNames(),
    help="What to patch: a task, a folder of images, or several.",
)
@options.model
@click.option(
    "--supported",
    type=options.TaskNames(),
    default=None,
    help="What must not get worse. Default: all rendered tasks.",
)
@searching
@click.option(
    "--rule",
    type=click.Choice(["patching", "mean"]),
    default="patching",
    show_default=True,
    help="How alpha is chosen: see the text above.",
)
@click.option(
    "--max-supported-drop",
    type=click.FloatRange(0, 1),
    default=0.01,
    show_default=True,
    help="For --rule patching; 0.01 is one point.",
)
@click.option(
    "--strategy",
    type=click.Choice(["joint", "sequential", "parallel"]),
    default="joint",
    show_default=True,
    help="For several tasks: one fine-tuning on all; patch after patch; or one vector and alpha each.",
)
@given
@running("patched-TASK")
def command(task: tuple[str, ...], run: Run, **settings: Any) -> None:
    """Make a model better at one task, or several, without making it worse at others (PAINT, arXiv 2208.05592).

    Fine-tunes on the task under the frozen zero-shot head, tries (1 - alpha) base + alpha finetuned for one alpha after
    another on validation data, chooses one, confirms it once on test data, and writes the patched model, results.jsonl,
    summary.json, report.html and frontier.png.

    \b
    --rule patching  the best patching accuracy that keeps the supported mean, with 95 % confidence,
                     within --max-supported-drop of the base's
    --rule mean      the best mean of patching accuracy and supported mean
    """
    from weightops.workflows.patch import Patch

    check_training(settings)
    workflow = Patch(task, **settings)
    go(workflow, run, "-".join(["patched", *(t.name for t in workflow.patching)]))
