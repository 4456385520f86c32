"""Options that several verbs have, and how values are read from text."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partialmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.shell_completion import CompletionItem

from weightops.errors import UnknownNameError

if TYPE_CHECKING:
    from weightops.checkpoints.checkpoint import Checkpoint
    from weightops.engine.evaluate import OnNonfinite

F = TypeVar("F", bound=Callable[..., Any])


class TaskNames(click.ParamType):  # type: ignore[type-arg]
    """Names of tasks or folders of images, separated by commas; completed by the shell."""

    name = "TASK[,TASK]"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, ...]:
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

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
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

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[float, ...]:
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
            return tuple(
                round(start + i * step, 10) for i in range(int((stop - start) / step + 1 + 1e-9))
            )
        except ValueError:
            self.fail(
                f"{value!r} is neither numbers such as 0,0.1,0.4 nor a rising range such as 0:1:0.05",
                param,
                ctx,
            )


class NodeOf(click.ParamType):  # type: ignore[type-arg]
    """A node's number, from 0, and how many there are."""

    name = "INDEX/COUNT"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int]:
        index, _, count = str(value).partition("/")
        if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
            self.fail(
                f"{value!r} is not a node such as 0/4, the first of four, or 3/4, the last",
                param,
                ctx,
            )
        return int(index), int(count)


def model(function: F) -> F:
    """``--model``."""
    return click.option(
        "--model",
        default="embedded",
        show_default=True,
        help="A path to a model with its configuration, or a ref.",
    )(function)


def training(function: F) -> F:
    """The fields of a training configuration that people change."""
    for flag, kind, text in (
        ("--lr", click.FloatRange(0, min_open=True), "Peak learning rate of AdamW."),
        ("--batch-size", click.IntRange(1), "Images a step."),
        ("--steps", click.IntRange(1), "Steps of fine-tuning."),
    ):
        function = click.option(
            flag,
            type=kind,
            default=None,
            help=f"{text} Default: the model's own, else the papers'.",
        )(function)
    return function


def learning(function: F) -> F:
    """``--task`` or ``--text``."""
    text = click.Path(exists=True, dir_okay=False, path_type=Path)
    function = click.option(
        "--text", type=text, help="What a language model of transformers is to learn: UTF-8."
    )(function)
    return click.option(
        "--task", type=OneTask(), help="What to learn: a task or a folder of images."
    )(function)


def one_of(task: str | None, text: Path | None) -> None:
    """Refuse neither and both."""
    if (task is None) == (text is None):
        raise click.UsageError("name what to learn: --task, or --text for a language model")


def device(function: F) -> F:
    """``--device``."""
    return click.option(
        "--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, ..."
    )(function)


def seed(function: F) -> F:
    """``--seed``."""
    return click.option(
        "--seed", type=click.IntRange(0), default=0, show_default=True, help="Of everything random."
    )(function)


def node_data(function: F) -> F:
    """``--node-data``."""
    return click.option(
        "--node-data",
        type=click.Choice(["shuffle", "shard"]),
        default="shuffle",
        show_default=True,
        help="A node's own order of all images, or its own part of them.",
    )(function)


def checkpoints(function: F) -> F:
    """``--checkpoint-every`` and ``--resume``."""
    function = click.option(
        "--resume", is_flag=True, help="Go on from the last state in the folder."
    )(function)
    return click.option(
        "--checkpoint-every",
        type=click.IntRange(1),
        default=500,
        show_default=True,
        help="Steps between states to resume from.",
    )(function)


def printing(function: F) -> F:
    """``--json`` and ``-q``."""
    function = click.option(
        "-q",
        "--quiet",
        is_flag=True,
        callback=_quiet,
        expose_value=False,
        help="No progress and no warnings.",
    )(function)
    return click.option("--json", "as_json", is_flag=True, help="JSON on stdout.")(function)


def _quiet(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        quieten()


def of_method(method: Any, texts: Mapping[str, str]) -> dict[str, Any]:
    """A merge method's options, from what was typed.

    Raises:
        UsageError: for a value of another type.
        UnknownNameError: for an option that it hasn't, or a choice that isn't one.
    """
    method.check({name: text for name, text in texts.items() if name not in method.options})
    values = {}
    for name, text in texts.items():
        kind = method.options[name].type
        try:
            values[name] = (
                {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
            )
        except (ValueError, KeyError):
            raise click.UsageError(
                f"{name} of {method.name} is {kind.__name__}, not {text!r}"
            ) from None
    checked: dict[str, Any] = method.check(values)
    return {name: checked[name] for name in values}


def quieten() -> None:
    """No progress bars and no warnings from here on."""
    import os

    from tqdm import tqdm

    os.environ["TQDM_DISABLE"] = (
        "1"  # for processes that are started; in this one tqdm has looked when it was imported
    )
    tqdm.__init__ = partialmethod(tqdm.__init__, disable=True)
    logging.getLogger("weightops").setLevel(logging.ERROR)


class Size(click.ParamType):  # type: ignore[type-arg]
    """Bytes, as 5GB or 200MB."""

    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", str(value).strip().upper())
        if not match or not float(match[1]):
            self.fail(f"{value!r} is not a size such as 5GB or 200MB", param, ctx)
        return int(float(match[1]) * 1000 ** " KMGT".index(match[2] or " "))


def _needed(ctx: click.Context, param: click.Parameter, value: Path | None) -> Path | None:
    if value is None and not ctx.params.get("print_recipe"):
        raise click.MissingParameter(ctx=ctx, param=param)
    return value


def batchnorm(function: F) -> F:
    """``--batchnorm``."""
    return click.option(
        "--batchnorm",
        type=OneTask(),
        default=None,
        help="Recompute running statistics on the images of a task.",
    )(function)


def output(function: F) -> F:
    """How a checkpoint is written: ``-o`` and its kin."""
    for decorate in (
        click.option(
            "--dry-run",
            is_flag=True,
            help="Say what it would read, write and take, and do nothing.",
        ),
        click.option(
            "--resume",
            is_flag=True,
            help="Go on from where a killed run stopped; keep what an interrupted one did.",
        ),
        pushing,
        click.option(
            "--device",
            default="cpu",
            show_default=True,
            help="Where to compute: cpu, cuda, cuda:1, ..., or auto.",
        ),
        click.option(
            "--on-nonfinite",
            type=click.Choice(["ignore", "warn", "error"]),
            default="warn",
            show_default=True,
            help="What to do about NaN and Inf in the result.",
        ),
        click.option(
            "--max-shard-size",
            type=Size(),
            default=None,
            help="Split the weights into files of at most this size, such as 5GB.",
        ),
        click.option(
            "--out-dtype",
            type=click.Choice(["float64", "float32", "bfloat16", "float16"]),
            default=None,
            help="Default: the first model's or base's.",
        ),
        click.option(
            "--format",
            "library",
            type=click.Choice(["open_clip", "transformers", "timm", "safetensors"]),
            default=None,
            help="What the output is to load in. Default: what the first model or base loads in.",
        ),
        click.option(
            "-o",
            "--out",
            callback=_needed,
            type=click.Path(path_type=Path),
            help="A .safetensors file, or a folder that loads where the first model or base did.",
        ),
        writing,
    ):
        function = decorate(function)
    return function


def save(
    merged: Checkpoint,
    what: str,
    as_json: bool,
    *,
    out: Path,
    out_dtype: str | None,
    max_shard_size: int | None,
    overwrite: bool,
    on_nonfinite: OnNonfinite,
    resume: bool,
    dry_run: bool,
    library: str | None,
    push: str | None,
    device: str,
) -> None:
    """Write a checkpoint as the options of `output` say, in all processes that torchrun started, and say so."""
    import torch

    from weightops.algebra.linear_form import provenance
    from weightops.checkpoints.matching import convert_to
    from weightops.engine.ranks import torchrun
    from weightops.hub.push import check_push

    if push and not dry_run:
        check_push(push)
    if push and out.suffix == ".safetensors":
        raise click.UsageError(f"{out} is one file; --push takes a folder, with its model card")
    merged = convert_to(merged, library) if library else merged
    dtype = getattr(torch, out_dtype) if out_dtype else None
    if dry_run:
        takes = asdict(merged.estimate(out, dtype=dtype, max_shard_size=max_shard_size))
        echo_plan({"output": str(out), **takes}, as_json)
        return
    with torchrun() as ranks:
        merged.save(
            out,
            overwrite=overwrite,
            dtype=dtype,
            max_shard_size=max_shard_size,
            on_nonfinite=on_nonfinite,
            resume=resume,
            ranks=ranks,
            device=device,
        )
        if not ranks.first:
            return
    address = pushed(out, push)
    if as_json:
        recipe = {"recipe": merged.recipe} if merged.recipe else {}
        echo_json({"output": str(out), **recipe, **provenance(merged.form), **address})
    else:
        click.echo(f"{out}: {what}, {len(merged)} tensors")


def pushed(folder: Path, repo: str | None) -> dict[str, str]:
    """Upload a folder where that is asked for, and say where it is."""
    from weightops.hub.push import push

    if repo is None:
        return {}
    address = push(folder, repo)
    click.echo(f"pushed to {address}", err=True)
    return {"pushed": address}


def folder(text: str) -> Callable[[F], F]:
    """``--out`` for what isn't a checkpoint, and ``--overwrite``."""

    def decorate(function: F) -> F:
        return click.option(
            "-o", "--out", type=click.Path(path_type=Path), default=None, help=text
        )(writing(function))

    return decorate


def pushing(function: F) -> F:
    """``--push``."""
    return click.option(
        "--push",
        metavar="ORG/NAME",
        default=None,
        help="Then upload the folder to the Hugging Face Hub.",
    )(function)


def writing(function: F) -> F:
    """``--overwrite``."""
    return click.option(
        "--overwrite",
        is_flag=True,
        help="Replace an output that exists; it stays until the new one is complete.",
    )(function)


def echo_json(value: Any) -> None:
    """Print JSON to stdout."""
    from weightops.support.json_files import jsonable

    click.echo(json.dumps(jsonable(value), indent=2, ensure_ascii=False))


def echo_plan(plan: Mapping[str, Any], as_json: bool) -> None:
    """Print what is or would be done: JSON, or a line for each thing."""
    if as_json:
        echo_json(dict(plan))
    else:
        for name, value in plan.items():
            size = any(word in name for word in ("bytes", "memory", "disk"))
            click.echo(
                f"{name.replace('_', ' '):17} {f'{value / 1e6:,.1f} MB' if size else shown(value)}"
            )


def shown(value: Any) -> str:
    """A value for people at a terminal."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {shown(item)}" for name, item in value.items())
    if isinstance(value, (tuple, list)):
        return ", ".join(map(shown, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
