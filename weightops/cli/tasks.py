"""``weightops tasks``."""

from __future__ import annotations

from typing import Any

import click

from weightops.cli.from_signature import Borrowed, command
from weightops.cli.printing import echo, echo_json, show
from weightops.errors import TaskError, printable


@command(
    Borrowed("weightops.tasks.table:as_read", only=("class_order", "skip_unreadable")),
    metavar="[check TASK]",
)
def tasks(
    check: tuple[str, ...] = (), *, classes: bool = False, json_: bool = False, **how: Any
) -> None:
    """List the tasks: sizes, classes, source and licence; or check one.

    `weightops tasks check TASK` decodes every picture once. It counts the pictures of each class,
    and lists pictures that can't be read and pictures that are in two splits. The exit code is 1 if
    some can't be read, unless --skip-unreadable leaves them out, as it does in other verbs.

    Args:
        check: the word check, and a task.
        classes: name every class and template.
    """
    from weightops.reports.table import table
    from weightops.tasks.table import TASKS, as_read

    if check:
        if check[0] != "check" or len(check) != 2:
            raise click.UsageError("a check is spelt `weightops tasks check TASK`")
        skip = how.pop("skip_unreadable", False)
        _check(as_read(check[1], **how), json_, skip_unreadable=skip)
        return
    if how:
        raise click.UsageError("--class-order and --skip-unreadable are for a check")
    if json_:
        fields = ("classes", "templates", "sizes", "source", "license")
        echo_json({n: {f: getattr(task, f) for f in fields} for n, task in TASKS.items()})
        return
    splits = ("train", "validation", "test")
    rows = [
        [t.name, len(t.classes), *(f"{t.sizes[s]:,}" for s in splits), t.license, t.source]
        for t in TASKS.values()
    ]
    echo(table(["task", "classes", *splits, "licence", "source"], rows))
    for task in TASKS.values() if classes else ():
        echo(f"\n{task.name}\n  classes    {show(task.classes)}")
        echo(f"  templates  {' | '.join(task.templates)}")


def _check(name: str, as_json: bool, *, skip_unreadable: bool) -> None:
    """Print what `check_task` finds, the classes in the order that the task says."""
    from weightops.reports.table import table
    from weightops.tasks.check import check_task
    from weightops.tasks.class_names import ordered
    from weightops.tasks.table import as_task

    task = as_task(name)
    found = check_task(task)
    names = ordered(task, "task")
    order = [names.index(name) for name in ordered(task, task.class_order or "task")]
    if as_json:
        counts = {split: [row[i] for i in order] for split, row in found.counts.items()}
        facts = {"counts": counts, "faults": found.faults, "copies": found.copies}
        classes = [task.classes[i] for i in order]
        echo_json({"task": task.name, "classes": classes, "class_order": task.class_order, **facts})
    else:
        rows = [[task.classes[i], *(counts[i] for counts in found.counts.values())] for i in order]
        echo(table(["class", *found.counts], rows))
        for (split, index), (first, other) in found.copies:
            echo(f"{split} {index} is {first} {other}")
        for split, faults in found.faults.items():
            for index, text in faults.items():
                echo(f"{split} {index}: {printable(text)}")
        echo(f"{len(found.copies)} pictures are in two splits")
    unreadable = sum(map(len, found.faults.values()))
    if unreadable and not skip_unreadable:
        raise TaskError(f"{unreadable} pictures of {task.name} can't be read")
