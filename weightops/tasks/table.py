"""The tasks that can be named."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

from weightops.errors import TaskError
from weightops.support.registry import Registry
from weightops.tasks import embedded, rendered
from weightops.tasks.archives import archive_task, is_archive
from weightops.tasks.derived import DERIVED
from weightops.tasks.folder import folder_task
from weightops.tasks.hub import NAME, hub_task
from weightops.tasks.task import Task

TASKS: Registry[Task] = Registry(
    "task", "tasks", {task.name: task for task in (*embedded.TASKS, *rendered.TASKS)}
)

RENDERED = tuple(task.name for task in rendered.TASKS)
"""The tasks that are drawn on the fly: what a patch must not harm, by default."""


@lru_cache(maxsize=256)
def find_task(name: str) -> Task:
    """A task by its name, a folder of images by its path, a data set on the Hub, or one derived from these, as ``typographic:shapes``.

    Raises:
        UnknownNameError: if there is none of that name.
        TaskError: if a folder isn't one of labelled images, or a data set can't be had.
    """
    kind, colon, rest = name.partition(":")
    if colon and kind in DERIVED:
        return DERIVED[kind](find_task(rest))
    folder = Path(name)
    if "/" in name or (name not in TASKS and folder.is_dir()):
        if is_archive(folder):
            return archive_task(
                folder.resolve().name.removeprefix("wds_"), lambda _: folder, f"the folder {folder}"
            )
        elsewhere = not folder.exists() and not folder.parent.exists() and NAME.fullmatch(name)
        return hub_task(name) if elsewhere else folder_task(folder)
    return TASKS[name]


def as_tasks(tasks: str | Task | Iterable[str | Task]) -> list[Task]:
    """Tasks by name or as they are, each once.

    Raises:
        TaskError: if two are called the same: results go by names.
    """
    listed = [tasks] if isinstance(tasks, (str, Task)) else tasks
    found = list(
        dict.fromkeys(find_task(task) if isinstance(task, str) else task for task in listed)
    )
    names = [task.name for task in found]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise TaskError(
            f"two different tasks are called {twice[0]}: rename a folder, results go by names"
        )
    return found
