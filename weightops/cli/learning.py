"""Options of the verbs that fine-tune one model: what it learns, and as which node."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from weightops.cli.from_signature import Borrowed
from weightops.cli.types import OneTask

TASK = click.Option(["--task"], type=OneTask(), help="What to learn: a task or a folder of images.")
TEXT = click.Option(
    ["--text"],
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="What a language model of transformers is to learn: a text in UTF-8.",
)
NODE = Borrowed(
    "weightops.training.nodes:Node",
    only=("data", "every", "only"),
    names={"data": "node_data", "every": "average_every"},
)


def check_one(given: dict[str, Any]) -> None:
    """Refuse neither and both of a task and a text."""
    if ("task" in given) == ("text" in given):
        raise click.UsageError("name the data: --task, or --text for a language model")
