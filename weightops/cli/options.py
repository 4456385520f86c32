"""Options that several verbs have, and how values are read from text."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from typing import Any, TypeVar

import click
from click.shell_completion import CompletionItem

from weightops.errors import UnknownNameError

F = TypeVar("F", bound=Callable[..., Any])


class TaskNames(click.ParamType):  # type: ignore[type-arg]
    """Names of tasks or folders of images, separated by commas; completed by the shell."""

    name = "TASK[,TASK]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        from weightops.errors import TaskError
        from weightops.tasks.table import find_task

        names = (
            tuple(value)
            if isinstance(value, (tuple, list))
            else tuple(part.strip() for part in value.split(",") if part.strip())
        )
        if not names:
            self.fail("name at least one task", param, ctx)
        try:
            for name in names:
                find_task(name)
        except (UnknownNameError, TaskError) as error:
            self.fail(str(error), param, ctx)
        return names

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        from weightops.tasks.table import TASKS

        done, _, last = incomplete.rpartition(",")
        prefix = f"{done}," if done else ""
        return [CompletionItem(prefix + name) for name in TASKS if name.startswith(last)]


class OneTask(TaskNames):
    """The name of one task, or a folder of images."""

    name = "TASK"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        names = super().convert(value, param, ctx)
        if len(names) != 1:
            self.fail(f"one task, please, not {len(names)}", param, ctx)
        return names[0]


class Alphas(click.ParamType):  # type: ignore[type-arg]
    """Numbers separated by commas, or START:STOP:STEP."""

    name = "A,B,...|START:STOP:STEP"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        if not isinstance(value, str):
            return tuple(value)
        try:
            numbers = [float(part) for part in value.replace(",", ":").split(":")]
            if not all(map(math.isfinite, numbers)):
                raise ValueError
            if ":" not in value:
                return tuple(numbers)
            start, stop, step = numbers
            if step <= 0 or stop < start or (stop - start) / step > 10_000:
                raise ValueError
            return tuple(round(start + i * step, 10) for i in range(int((stop - start) / step + 1 + 1e-9)))
        except ValueError:
            self.fail(f"{value!r} is neither numbers such as 0,0.1,0.4 nor a rising range such as 0:1:0.05", param, ctx)


def model(function: F) -> F:
    """``--model``."""
    return click.option(
        "--model", default="embedded", show_default=True, help="A path to a model with its configuration, or a ref."
    )(function)


def training(function: F) -> F:
    """The fields of a training configuration that people change."""
    for flag, kind, text in (
        ("--lr", click.FloatRange(0, min_open=True), "Peak learning rate of AdamW."),
        ("--batch-size", click.IntRange(1), "Images a step."),
        ("--steps", click.IntRange(1), "Steps of fine-tuning."),
    ):
        function = click.option(
            flag, type=kind, default=None, help=f"{text} Default: the model's own, else the papers'."
        )(function)
    return function


def device(function: F) -> F:
    """``--device``."""
    return click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, ...")(function)


def seed(function: F) -> F:
    """``--seed``."""
    return click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of everything random.")(
        function
    )


def printing(function: F) -> F:
    """``--json`` and ``-q``."""
    function = click.option(
        "-q", "--quiet", is_flag=True, callback=_quiet, expose_value=False, help="No progress and no warnings."
    )(function)
    return click.option("--json", "as_json", is_flag=True, help="JSON on stdout.")(function)


def _quiet(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        import os

        os.environ["TQDM_DISABLE"] = "1"
        logging.getLogger("weightops").setLevel(logging.ERROR)


def writing(function: F) -> F:
    """``--overwrite``."""
    return click.option(
        "--overwrite", is_flag=True, help="Replace an output that exists; it stays until the new one is complete."
    )(function)


def echo_json(value: Any) -> None:
    """Print JSON to stdout."""
    from weightops.files import jsonable

    click.echo(json.dumps(jsonable(value), indent=2, ensure_ascii=False))
