"""``weightops explore``."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from weightops.cli import from_signature
from weightops.cli.from_signature import Borrowed
from weightops.cli.printing import echo, echo_json

if TYPE_CHECKING:
    from weightops.tasks.table import TaskList


@from_signature.command(
    Borrowed(
        "weightops.workflows.explore_server:serving",
        only=("images", "port", "device", "precision", "overwrite"),
    )
)
def explore(
    model: str,
    *,
    vectors: tuple[str, ...],
    tasks: TaskList,
    out: Path = Path("recipe.yaml"),
    json_: bool = False,
    **given: Any,
) -> None:
    """Move coefficients by hand in a page on this machine, and watch accuracies follow.

    The page has a slider for each vector, what is fixed and broken on validation images, pictures
    of your own to drop on it, and a button that writes the recipe of what you see. Ctrl-C ends it.

    Args:
        model: a path to a model with its configuration, or a ref.
        vectors: task vectors or fine-tuned weights, one or several.
        tasks: what to measure on.
        out: the recipe that the button writes, for merge.
    """
    from weightops.workflows.explore_server import serving

    with serving(model, vectors, tasks, out, **given) as server:
        try:
            if json_:
                echo_json({"address": server.address})
            else:
                echo(f"{server.address}\nOpen it in a browser; Ctrl-C ends it.")
            while True:
                time.sleep(1)  # of a longer wait, a Ctrl-C right before it is seen at its end
        except KeyboardInterrupt:
            echo("ended", err=True)


class _Explore(click.Command):
    """A command that takes all words after --vectors as vectors."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, list(_spelt_out(args)))


def _spelt_out(args: Sequence[str]) -> Iterator[str]:
    """Yield the words of a command line with --vectors before each vector.

    >>> list(_spelt_out(["m", "--vectors", "a", "b", "--tasks", "t"]))
    ['m', '--vectors', 'a', '--vectors', 'b', '--tasks', 't']
    """
    option, words = "--vectors", 0
    inside = False
    for arg in args:
        if arg == option:
            inside, words = True, 0
        elif arg.startswith("-"):
            inside = False
        elif inside:
            words += 1
            if words > 1:
                yield option
        yield arg


command = _Explore(
    explore.name, params=explore.params, callback=explore.callback, help=explore.help
)
