"""Where the log of a fine-tuning goes besides its folder: TensorBoard, Weights & Biases, a file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from weightops.errors import OptionError, missing_extra

Line = Mapping[str, float]
"""A line of the log: step, loss, lr, seconds, and seconds in communication."""

OnLine = Callable[[Line], None]
"""A function that is called with each line of the log."""

PROJECT, FOLDER = "weightops", "runs"
"""The project of Weights & Biases, and TensorBoard's folder, where nothing else is said."""


@contextmanager
def log_sink(log_to: str | None, run: str, config: Mapping[str, Any]) -> Iterator[OnLine]:
    """Open what a log goes to, and yield the function that writes a line.

    Args:
        log_to: "tensorboard" or "tensorboard:FOLDER", "wandb" or "wandb:PROJECT", "jsonl:PATH", or
            None for nothing.
        run: the name of the run.
        config: the recipe, which is recorded, too.

    Raises:
        OptionError: for anything else.
        MissingExtraError: if the library isn't installed.
    """
    if log_to is None:
        yield lambda line: None
        return
    kind, _, where = log_to.partition(":")
    if kind not in _SINKS or (kind == "jsonl" and not where):
        raise OptionError(f"a log can't go to {log_to!r}", hint="tensorboard, wandb or jsonl:PATH")
    with _SINKS[kind](where, run, config) as on_line:
        yield on_line


@contextmanager
def _jsonl(path: str, run: str, config: Mapping[str, Any]) -> Iterator[OnLine]:
    """Append to a file, a whole line at once, so that several nodes can share it."""
    with Path(path).open("a", encoding="utf-8", buffering=1) as file:

        def on_line(line: Line) -> None:
            file.write(json.dumps({"run": run, **line}) + "\n")

        yield on_line


@contextmanager
def _tensorboard(folder: str, run: str, config: Mapping[str, Any]) -> Iterator[OnLine]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise missing_extra("tensorboard", "tensorboard", "to write its events") from None
    with SummaryWriter(str(Path(folder or FOLDER) / run)) as writer:
        rows = "\n".join(f"| {name} | {value} |" for name, value in config.items())
        writer.add_text("config", f"| setting | value |\n|---|---|\n{rows}")

        def on_line(line: Line) -> None:
            for name, value in line.items():
                if name != "step":
                    writer.add_scalar(name, value, int(line["step"]))

        yield on_line


@contextmanager
def _wandb(project: str, run: str, config: Mapping[str, Any]) -> Iterator[OnLine]:
    try:
        import wandb
    except ImportError:
        raise missing_extra("wandb", "wandb", "to log to Weights & Biases") from None
    with wandb.init(project=project or PROJECT, name=run, config=dict(config)) as opened:

        def on_line(line: Line) -> None:
            values = {name: value for name, value in line.items() if name != "step"}
            opened.log(values, step=int(line["step"]))

        yield on_line


_SINKS = {"tensorboard": _tensorboard, "wandb": _wandb, "jsonl": _jsonl}
