"""``weightops statistics``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from weightops.cli.from_signature import Borrowed, command
from weightops.cli.learning import check_one
from weightops.cli.printing import echo_plan
from weightops.cli.signatures import read
from weightops.cli.types import OneTask
from weightops.support.text import counted

_COLLECT = "weightops.statistics.collect:collect"
_TEXT = click.Option(
    ["--text"],
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="For a language model of transformers: a text in UTF-8.",
)
_TASK = click.Option(["--task"], type=OneTask(), help="The task whose images to use.")


@command(
    Borrowed(_COLLECT, leave_out=("model", "task", "text")),
    arguments=[_TASK, _TEXT],
    about=read(_COLLECT).docstring.text,
)
def statistics(
    model: str,
    *,
    out: Path,
    resume: bool = False,
    overwrite: bool = False,
    json_: bool = False,
    **given: Any,
) -> None:
    """Collect a statistic of a model, and write it to a file.

    Args:
        model: a path to a model with its configuration, or a ref.
        out: the .safetensors file to write.
        resume: continue a run that was killed, of which every 512 images are kept.
        overwrite: replace an output that exists.
    """
    from weightops.checkpoints.statistic_record import record_of
    from weightops.statistics.resuming import collect_to

    check_one(given)
    if out.suffix != ".safetensors":
        raise click.UsageError(f"a statistic is one .safetensors file, not {out}")
    found = collect_to(out, model, resume=resume, overwrite=overwrite, **given)
    plan = {"output": str(out), "tensors": len(found), **record_of(found)}
    echo_plan(plan if json_ else _in_short(plan), json_)


def _in_short(plan: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record with counts in place of what it says of each weight."""
    short = dict(plan)
    if "rows" in plan:
        parts = [own if isinstance(own, list) else [own] for own in plan["rows"].values()]
        least, most = min(map(min, parts)), max(map(max, parts))
        short["rows"] = f"{least:,}" if least == most else f"{least:,} to {most:,}"
        short["rows"] += " for each tensor"
    if "input_first" in plan:
        short["input_first"] = counted(len(plan["input_first"]), "tensor")
    return short
