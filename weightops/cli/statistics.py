"""``weightops statistics``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from weightops.cli.from_signature import Borrowed, command
from weightops.cli.learning import check_one
from weightops.cli.printing import echo_plan
from weightops.cli.signatures import read
from weightops.cli.types import OneTask

_COLLECT = "weightops.statistics.collect:collect"
_TEXT = click.Option(
    ["--text"],
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="For a language model of transformers: a text in UTF-8.",
)
_TASK = click.Option(["--task"], type=OneTask(), help="The task whose images to use.")


@command(
    Borrowed(_COLLECT, leave_out=("model", "task", "text", "start")),
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
    from weightops.checkpoints.opening import open_checkpoint
    from weightops.checkpoints.statistic_record import record_of
    from weightops.statistics.collect import collect
    from weightops.statistics.resuming import collect_to
    from weightops.support.atomic import check_free

    check_one(given)
    if out.suffix != ".safetensors":
        raise click.UsageError(f"a statistic is one .safetensors file, not {out}")
    checkpoint = open_checkpoint(model)
    inputs = [file.path for file in checkpoint.form.files]
    check_free(out, overwrite=overwrite, inputs=inputs)
    if "text" in given:
        found = collect(checkpoint, **given)
        found.save(out, overwrite=overwrite)
    else:
        found = collect_to(out, checkpoint, resume=resume, overwrite=overwrite, **given)
    echo_plan({"output": str(out), "tensors": len(found), **record_of(found)}, json_)
