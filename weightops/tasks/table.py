"""The tasks that have a name: built-in ones, those registered in a session, plug-ins, paths."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

from weightops.errors import OptionError, TaskError
from weightops.support.registry import Registry
from weightops.tasks import embedded, rendered
from weightops.tasks.archives import archive_task, is_archive
from weightops.tasks.class_names import in_order
from weightops.tasks.derived import DERIVED
from weightops.tasks.folder import folder_task
from weightops.tasks.hub import NAME, hub_task, local_table, local_table_task
from weightops.tasks.scored import SCORE, scored_task
from weightops.tasks.task import Task
from weightops.tasks.texts import refuse_texts, text_task

TaskLike = str | Task
"""A task, or the name of one: see `as_task`."""

TaskList = str | Task | Iterable[str | Task]
"""One task or several, each by name or as a `Task`: see `as_tasks`."""

SUPPORTED = ("shapes", "colors", "textures", "counting", "letters", "fonts", "words")
"""The tasks that an edit must not harm, unless others are named: those drawn by weightops."""

EVALUATED = ("mnist", "digits", *SUPPORTED)
"""The tasks that ``weightops evaluate`` scores, unless others are named."""


def _plugin_task(name: str, thing: Any) -> Task:
    """Return the task that an entry point names, or that the function it names returns."""
    task = thing if isinstance(thing, Task) else thing()
    if not isinstance(task, Task):
        raise TypeError(f"a Task is needed, not {type(task).__name__}")
    if task.name != name:
        raise ValueError(f"the task is called {task.name!r}, its entry point {name!r}")
    return task


TEXTS = (".txt", ".md", ".rst")
"""Suffixes of names that are taken for texts, so that a missing file is named."""

_ORDER = "order="
"""What a name begins with that says the order of a classifier's outputs."""

TASKS: Registry[Task] = Registry(
    "task",
    "tasks",
    {task.name: task for task in (*embedded.TASKS, *rendered.TASKS)},
    adapt=_plugin_task,
)


def register_task(task: Task | Callable[[], Task]) -> Task:
    """Add a task for this session, under its own name.

    Args:
        task: a `Task`, or a function without arguments that returns one.

    Returns:
        The task.

    Raises:
        OptionError: if another task has the name.
    """
    added = task if isinstance(task, Task) else task()
    TASKS.register(added.name, added)
    return added


def as_task(task: TaskLike) -> Task:
    """Return one task.

    Args:
        task: a `Task`, which is returned as it is, or the name of one (see `find_task`).

    Raises:
        TaskError: for what is neither.
    """
    if isinstance(task, (str, Path)):
        return find_task(str(task))
    if not isinstance(task, Task):
        raise TaskError(
            f"{task!r} was given where a task is needed",
            hint="give a name that `weightops tasks` lists, a folder of images or a Task",
        )
    return task


def as_tasks(tasks: TaskList) -> list[Task]:
    """Return several tasks, each once.

    Args:
        tasks: `Task`s or names (see `find_task`), or a single one.

    Raises:
        TaskError: if two different tasks have the same name, by which results are kept.
    """
    listed = [tasks] if isinstance(tasks, (str, Path, Task)) or tasks is None else tasks
    unique = list(dict.fromkeys(map(as_task, listed)))
    names = [task.name for task in unique]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise TaskError(
            f"two different tasks are called {twice[0]}",
            hint="rename a folder: results are kept by task name",
        )
    return unique


def as_read(
    name: str,
    *,
    score: str | None = None,
    class_order: str | None = None,
    skip_unreadable: bool = False,
) -> str:
    """Return the name of a task that is scored or read in another way.

    Args:
        name: the name of the task.
        score: a program that scores models in place of weightops: a command line, to which the
            folder of a model is added, and which prints a line of JSON for each item of its tasks,
            such as {"task": "sums", "item": "7", "value": 1}, the higher the better; or
            lm_eval:TASK, a task of lm-evaluation-harness. Items are split into halves for
            validation and test unless the lines say a "split".
        class_order: the order of a classifier's outputs: task, alphabetical (as torchvision sorts
            folders), natural (as timm does) or a file of names, one a line. Default: by the names
            that the model records, else the task's order.
        skip_unreadable: leave out pictures that can't be read, with a warning; results count them.

    >>> as_read("photos", class_order="natural", skip_unreadable=True)
    'order=natural:readable:photos'
    >>> as_read("sums", score="python judge.py")
    'score=python judge.py:sums'
    """
    if score is not None:
        if class_order is not None or skip_unreadable:
            raise OptionError("a program reads its own data", hint="leave out class_order=")
        return f"{SCORE}{score}:{name}"
    name = f"readable:{name}" if skip_unreadable else name
    return name if class_order is None else f"{_ORDER}{class_order}:{name}"


def find_task(name: str) -> Task:
    """Return the task of a name, of a folder, of a data set, or one derived from these.

    Args:
        name: a name in `TASKS`, such as ``shapes``; the path of a folder of images or of Parquet
            files, or of a text for language models; a data set on the Hugging Face Hub, such as
            ``ylecun/mnist``; any of them after the name of a derivation and a colon, such as
            ``typographic:shapes``,
            ``readable:photos`` or ``order=natural:photos``, see `as_read`.

    Raises:
        UnknownNameError: if no task has that name.
        TaskError: if a folder doesn't hold labelled images, or a data set isn't available.
    """
    return TASKS[name] if name in TASKS else _open_task(name)


@lru_cache(maxsize=256)
def _open_task(name: str) -> Task:
    """Return the task of a name that isn't in `TASKS`."""
    if not name:
        raise TaskError("a task's name is empty", hint="the working folder is called .")
    kind, colon, rest = name.partition(":")
    if colon and (kind in DERIVED or kind.startswith(_ORDER)):
        refuse_texts([find_task(rest)], f"{kind}: changes how images are read")
    if colon and kind in DERIVED:
        return DERIVED[kind](find_task(rest))
    if name.startswith(SCORE):
        return scored_task(name)
    if colon and kind.startswith(_ORDER):
        return in_order(find_task(rest), kind.removeprefix(_ORDER))
    folder, table = Path(name), local_table(name)
    if table is not None:
        return local_table_task(*table)
    if folder.is_file() or folder.suffix in TEXTS:
        return text_task(folder)
    if "/" not in name and not folder.is_dir():
        return TASKS[name]  # raises the error that names the nearest tasks
    if is_archive(folder):
        task_name = folder.resolve().name.removeprefix("wds_")
        return archive_task(task_name, lambda _: folder, f"the folder {folder}")
    elsewhere = not folder.exists() and not folder.parent.exists() and NAME.fullmatch(name)
    return hub_task(name) if elsewhere else folder_task(folder)
