"""Print results for people and for machines, and progress or none."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from functools import partialmethod
from typing import Any

import click

from weightops.errors import printable


def echo(text: str, *, nl: bool = True, err: bool = False) -> None:
    """Print lines, with the control characters that names in them bring along escaped."""
    click.echo("\n".join(map(printable, text.split("\n"))), nl=nl, err=err)


def echo_json(value: Any) -> None:
    """Print JSON to stdout."""
    from weightops.support.json_files import json_text

    click.echo(json_text(value))


def echo_plan(plan: Mapping[str, Any], as_json: bool) -> None:
    """Print what is or would be done: as JSON, or a line for each entry."""
    if as_json:
        echo_json(dict(plan))
        return
    for name, value in plan.items():
        is_size = any(word in name for word in ("bytes", "memory", "disk"))
        shown = f"{value / 1e6:,.1f} MB" if is_size else show(value)
        echo(f"{name.replace('_', ' '):17} {shown}")


def show(value: Any) -> str:
    """Return a value for people at a terminal."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {show(item)}" for name, item in value.items())
    if isinstance(value, (tuple, list)):
        return ", ".join(map(show, value))
    if value is None:
        return "unknown"
    return f"{value:g}" if isinstance(value, float) else printable(str(value))


def quieten() -> None:
    """Show no progress bars and no warnings from here on."""
    from tqdm import tqdm

    os.environ["TQDM_DISABLE"] = "1"  # for processes that are started; tqdm reads it when imported
    tqdm.__init__ = partialmethod(tqdm.__init__, disable=True)
    logging.getLogger("weightops").setLevel(logging.ERROR)
