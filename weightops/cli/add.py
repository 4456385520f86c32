"""``weightops add``."""

from __future__ import annotations

from typing import Any

import click

from weightops.cli.method_options import read_method_options
from weightops.cli.workflows import workflow_command


def _read_method_options(given: dict[str, Any]) -> None:
    from weightops.merging.methods.table import METHODS

    name = given.get("method", "sum")
    method = METHODS["task_arithmetic" if name == "sum" else name]
    texts = dict(pair.partition("=")[::2] for pair in given.pop("method_options", ()))
    given["method_options"] = read_method_options(method, texts)


command = workflow_command(
    "weightops.workflows.add:add",
    lambda workflow: ["added", *(task.name for task in workflow.added)],
    arguments=[
        click.Option(
            ["method_options", "--option"],
            multiple=True,
            metavar="NAME=VALUE",
            help="An option of the method, such as density=0.2.",
        )
    ],
    prepare=_read_method_options,
)
