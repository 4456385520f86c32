"""``weightops soup``."""

import click

from weightops.cli.workflows import workflow_command

command = workflow_command(
    "weightops.workflows.soup:soup",
    lambda workflow: ["soup"],
    arguments=[click.Argument(["models"], nargs=-1, required=True, metavar="MODEL...")],
    leave_out=("models",),
)
