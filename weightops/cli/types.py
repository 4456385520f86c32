"""Types of options: how values are read from text."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from weightops.cli.signatures import Kind
from weightops.errors import TaskError, UnknownNameError


class TaskNames(click.ParamType):  # type: ignore[type-arg]
    """Names of tasks or folders of images, separated by commas; completed by the shell."""

    name = "TASK[,TASK]"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, ...]:
        from weightops.tasks.table import find_task

        names = tuple(map(str, value) if isinstance(value, (list, tuple)) else _names(str(value)))
        if not names:
            self.fail("name at least one task", param, ctx)
        if ctx and isinstance(ctx.params.get("score"), str):  # the program knows its own
            return names
        try:
            for name in names:
                find_task(name)
        except (UnknownNameError, TaskError) as error:
            self.fail(str(error), param, ctx)
        return names

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        from weightops.tasks.table import TASKS

        done, _, last = incomplete.rpartition(",")
        prefix = f"{done}," if done else ""
        return [CompletionItem(prefix + name) for name in TASKS.names() if name.startswith(last)]


def _names(text: str) -> list[str]:
    """Return the names in a text; a comma in the path of a folder or file doesn't part names."""
    parts, names = text.split(","), []
    while parts:
        joined = {count: ",".join(parts[:count]).strip() for count in range(len(parts), 0, -1)}
        count = next((count for count, name in joined.items() if _is_path(name)), 1)
        names.append(joined[count])
        parts = parts[count:]
    return [name for name in names if name]


def _is_path(name: str) -> bool:
    """Return whether a name is that of a folder or file, perhaps after that of a derivation."""
    derivation, _, path = name.rpartition(":")
    return "," not in derivation and Path(path).exists()


class OneTask(TaskNames):
    """The name of one task, or a folder of images."""

    name = "TASK"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        names = super().convert(value, param, ctx)
        if len(names) != 1:
            self.fail(f"one task is needed, not {len(names)}", param, ctx)
        return names[0]


class TaskOrBase(OneTask):
    """The name of one task, or the word base."""

    name = "TASK|base"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return value if value == "base" else super().convert(value, param, ctx)


class Numbers(click.ParamType):  # type: ignore[type-arg]
    """Numbers separated by commas, or START:STOP:STEP."""

    name = "A,B,...|START:STOP:STEP"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[float, ...]:
        listed = isinstance(value, (list, tuple))
        try:
            return _numbers(",".join(map(str, value)) if listed else str(value))
        except ValueError:
            example = "neither numbers such as 0,0.1,0.4 nor a rising range such as 0:1:0.05"
            self.fail(f"{value!r} is {example}", param, ctx)


def _numbers(text: str) -> tuple[float, ...]:
    numbers = [float(part) for part in text.replace(",", ":").split(":")]
    if not all(map(math.isfinite, numbers)):
        raise ValueError
    if ":" not in text:
        return tuple(numbers)
    start, stop, step = numbers
    if step <= 0 or stop < start or (stop - start) / step > 10_000:
        raise ValueError
    count = int((stop - start) / step + 1 + 1e-9)
    return tuple(round(start + i * step, 10) for i in range(count))


class NodeOf(click.ParamType):  # type: ignore[type-arg]
    """A node's number, from 0, and how many there are."""

    name = "INDEX/COUNT"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int]:
        index, _, count = str(value).partition("/")
        if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
            example = "not a node such as 0/4, the first of four, or 3/4, the last"
            self.fail(f"{value!r} is {example}", param, ctx)
        return int(index), int(count)


class Size(click.ParamType):  # type: ignore[type-arg]
    """Bytes, as 5GB or 200MB.

    Args:
        may_be_zero: take 0, for none.
    """

    name = "SIZE"

    def __init__(self, *, may_be_zero: bool = False) -> None:
        self._may_be_zero = may_be_zero

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", str(value).strip().upper())
        if not match or not (float(match[1]) or self._may_be_zero):
            self.fail(f"{value!r} is not a size such as 5GB or 200MB", param, ctx)
        return int(float(match[1]) * 1000 ** " KMGT".index(match[2] or " "))


def of(kind: Kind) -> Any:
    """Return the click type of a kind of parameter, or None if there is none."""
    if kind.choices:
        return click.Choice(kind.choices)
    if kind.name == "float" and kind.many:
        return Numbers()
    if kind.name in ("int", "float") and kind.range is not None:
        ranged: Any = click.IntRange if kind.name == "int" else click.FloatRange
        return ranged(**dict(kind.range))
    return {
        "str": click.STRING,
        "int": click.INT,
        "float": click.FLOAT,
        "bool": click.BOOL,
        "Overwrite": click.BOOL,
        "Path": click.Path(path_type=Path),
        "TaskLike": OneTask(),
        "TaskList": TaskNames(),
        "BatchNorm": TaskOrBase(),
        "CheckpointLike": click.STRING,
        "Finetuned": click.STRING,
    }.get(kind.name)


def is_multiple(kind: Kind) -> bool:
    """Return True for an option that may be given several times, such as ``--only a --only b``."""
    return kind.name == "Finetuned" or (kind.many and kind.name != "float")
