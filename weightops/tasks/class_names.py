"""Names of classes: how they are spoken, in which order they come, and which output is which."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from weightops.errors import OptionError, TaskError
from weightops.support.text import first_few
from weightops.tasks.task import Task, read_lines


def in_words(name: str) -> str:
    """Return the name of a class as prompts have it: underscores become blanks."""
    return name.replace("_", " ")


def natural_key(name: str) -> list[str | int]:
    """Return a key that sorts numbers in names by value, as timm sorts the names of folders.

    >>> sorted(["10", "2", "b", "A"], key=natural_key)
    ['2', '10', 'A', 'b']
    """
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name.lower())]


def ordered(task: Task, order: str) -> list[str]:
    """Return the classes of a task, as its data name them, in the order of a classifier's outputs.

    Args:
        task: the task.
        order: "task" for the task's own order; "alphabetical" by character, as torchvision sorts
            folders; "natural" with numbers by value, as timm does; or the path of a file that lists
            all classes, one a line.

    Raises:
        OptionError: if there is no such file, or it doesn't list the task's classes.
    """
    names = list(task.raw_classes or task.classes)
    if order == "task":
        return names
    if order in ("alphabetical", "natural"):
        return sorted(names, key=natural_key if order == "natural" else None)
    if not Path(order).is_file():
        raise OptionError(
            f"there is no class order {order!r}",
            hint="class_order is task, alphabetical, natural or the path of a file of names",
        )
    listed = read_lines(Path(order))
    return [names[i] for i in positions([listed], task, order)[1]]


def in_order(task: Task, order: str) -> Task:
    """Return a task that says in which order a classifier with a head of its own has its classes.

    Args:
        task: the task.
        order: see `ordered`.

    Raises:
        OptionError: if there is no such order.
        TaskError: if a file lists other classes than the task's.
    """
    ordered(task, order)
    return replace(task, class_order=order)


def positions(
    known: Sequence[Sequence[str]], task: Task, source: str
) -> tuple[list[int], list[int]]:
    """Match the names of outputs with the classes of a task.

    Names match as the data have them, or as prompts do; else without regard to case, underscores
    and blanks.

    Args:
        known: the names of the outputs, and other names of the same outputs.
        task: the task.
        source: what records the names.

    Returns:
        The output of each class, and the class of each output.

    Raises:
        TaskError: if they don't match; it lists both.
    """
    for normalise in (str, _plain):
        for names in known:
            outputs = [normalise(name) for name in names]
            for classes in (task.raw_classes, task.classes):
                wanted = [normalise(name) for name in classes]
                if len(set(wanted)) == len(wanted) and sorted(wanted) == sorted(outputs):
                    return (
                        [outputs.index(name) for name in wanted],
                        [wanted.index(name) for name in outputs],
                    )
    raise TaskError(
        f"{source} names its classes {first_few(known[0])}, and {task.name} has "
        f"{first_few(task.raw_classes or task.classes)}: they don't match"
    )


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", name).strip().casefold()
