"""``weightops tasks``."""

from __future__ import annotations

import click

from weightops.cli.from_signature import command
from weightops.cli.printing import echo_json


@command()
def tasks(*, classes: bool = False, json_: bool = False) -> None:
    """List the tasks: sizes, classes, source and licence.

    Args:
        classes: name every class and template.
    """
    from weightops.reports.table import table
    from weightops.tasks.table import TASKS

    if json_:
        fields = ("classes", "templates", "sizes", "source", "license")
        echo_json({n: {f: getattr(task, f) for f in fields} for n, task in TASKS.items()})
        return
    splits = ("train", "validation", "test")
    rows = [
        [t.name, len(t.classes), *(f"{t.sizes[s]:,}" for s in splits), t.license, t.source]
        for t in TASKS.values()
    ]
    click.echo(table(["task", "classes", *splits, "licence", "source"], rows))
    for task in TASKS.values() if classes else ():
        click.echo(f"\n{task.name}\n  classes    {', '.join(task.classes)}")
        click.echo(f"  templates  {' | '.join(task.templates)}")
