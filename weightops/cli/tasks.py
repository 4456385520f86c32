"""``weightops tasks``."""

from __future__ import annotations

import click

from weightops.cli.from_signature import command
from weightops.cli.printing import echo_json
from weightops.errors import TaskError


@command(metavar="[check TASK]")
def tasks(check: tuple[str, ...] = (), *, classes: bool = False, json_: bool = False) -> None:
    """List the tasks: sizes, classes, source and licence; or check one.

    `weightops tasks check TASK` decodes every picture once. It counts the pictures of each class,
    and lists pictures that can't be read and pictures that are in two splits. The exit code is 1 if
    some can't be read.

    Args:
        check: the word check, and a task.
        classes: name every class and template.
    """
    from weightops.reports.table import table
    from weightops.tasks.table import TASKS

    if check:
        if check[0] != "check" or len(check) != 2:
            raise click.UsageError("a check is spelt `weightops tasks check TASK`")
        _check(check[1], json_)
        return
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


def _check(name: str, as_json: bool) -> None:
    """Print what `check_task` finds."""
    from weightops.reports.table import table
    from weightops.tasks.check import check_task
    from weightops.tasks.table import as_task

    task = as_task(name)
    found = check_task(task)
    if as_json:
        facts = {"counts": found.counts, "faults": found.faults, "copies": found.copies}
        echo_json({"task": task.name, "classes": task.classes, **facts})
    else:
        rows = [
            [class_name, *(counts[i] for counts in found.counts.values())]
            for i, class_name in enumerate(task.classes)
        ]
        click.echo(table(["class", *found.counts], rows))
        for (split, index), (first, other) in found.copies:
            click.echo(f"{split} {index} is {first} {other}")
        for split, faults in found.faults.items():
            for index, text in faults.items():
                click.echo(f"{split} {index}: {text}")
        click.echo(f"{len(found.copies)} pictures are in two splits")
    unreadable = sum(map(len, found.faults.values()))
    if unreadable:
        raise TaskError(f"{unreadable} pictures of {task.name} can't be read")
