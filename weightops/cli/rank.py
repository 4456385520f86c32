"""``weightops rank``."""

from __future__ import annotations

from typing import Any

from weightops.cli.borrowing import SCORED
from weightops.cli.config_files import write_run_file
from weightops.cli.from_signature import Borrowed, command
from weightops.cli.printing import echo, echo_json
from weightops.cli.signatures import read

_RANK = "weightops.workflows.rank:rank"


@command(
    Borrowed(_RANK, leave_out=("vectors",)),
    SCORED,
    about=read(_RANK).docstring.text,
    metavar="VECTOR...",
    optional=("out",),
)
def rank(vectors: tuple[str, ...], json_: bool = False, **given: Any) -> None:
    """Run `rank` and print its table."""
    from weightops.workflows import rank as module

    outcome = module.rank(vectors, **given)
    if "out" in given:
        write_run_file(given["out"])
    echo_json(outcome.record) if json_ else echo(outcome.text)
