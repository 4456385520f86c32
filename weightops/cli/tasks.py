"""``weightops tasks``."""

from __future__ import annotations

import click

from weightops.cli import options


@click.command()
@click.option("--classes", is_flag=True, help="Name every class and template.")
@options.printing
def command(classes: bool, as_json: bool) -> None:
    """List the tasks: sizes, classes, source and licence."""
    from weightops.reports.table import table
    from weightops.tasks.table import TASKS

    if as_json:
        fields = ("classes", "templates", "sizes", "source", "license")
        options.echo_json(
            {
                name: {field: getattr(task, field) for field in fields}
                for name, task in TASKS.items()
            }
        )
        return
    rows = [
        [
            t.name,
            len(t.classes),
            *(f"{t.sizes[s]:,}" for s in ("train", "validation", "test")),
            t.license,
            t.source,
        ]
        for t in TASKS.values()
    ]
    click.echo(table(["task", "classes", "train", "validation", "test", "licence", "source"], rows))
    if classes:
        for task in TASKS.values():
            click.echo(
                f"\n{task.name}\n  classes    {', '.join(task.classes)}\n  templates  {' | '.join(task.templates)}"
            )
