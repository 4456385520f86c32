"""``weightops analogy``."""

from __future__ import annotations

from typing import Any

import click

from weightops.cli.workflows import workflow_command

_TASKS = ("a", "b", "c", "target")


def _built_in_example(given: dict[str, Any]) -> None:
    named = [name for name in _TASKS if name in given]
    if named and len(named) < len(_TASKS):
        raise click.UsageError(
            "name all of --a, --b, --c and --target, or none for the built-in example"
        )
    if not named:
        from weightops.tasks.analogy_example import ANALOGY

        given |= dict(zip(_TASKS, ANALOGY, strict=True))


command = workflow_command(
    "weightops.workflows.analogy:analogy",
    lambda workflow: ["analogy", workflow.target.name],
    prepare=_built_in_example,
    optional=_TASKS,
)
