"""Write a checkpoint as the options of a verb say, and print what was written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from weightops.algebra.dtypes import EDITABLE
from weightops.cli.borrowing import taken
from weightops.cli.from_signature import Borrowed
from weightops.cli.printing import echo, echo_json, echo_plan
from weightops.cli.pushing import PUSHING, check_known_license, check_push, push_folder
from weightops.cli.signatures import names_in
from weightops.cli.types import Size
from weightops.cli.workflows import DRY_RUN

if TYPE_CHECKING:
    from weightops.checkpoints.checkpoint import Checkpoint

SAVE = Borrowed(
    "weightops.checkpoints.checkpoint:Checkpoint.save",
    only=("overwrite", "on_nonfinite", "resume", "device"),
)

_LIBRARIES = names_in("weightops.checkpoints.libraries.table:LIBRARIES")


def _required(ctx: click.Context, param: click.Parameter, value: Path | None) -> Path | None:
    if value is None and not ctx.params.get("print_recipe"):
        raise click.MissingParameter(ctx=ctx, param=param)
    return value


OUTPUT: Sequence[click.Parameter] = (
    click.Option(
        ["-o", "--out"],
        callback=_required,
        type=click.Path(path_type=Path),
        help="A .safetensors file, or a folder that loads where the first model or base did.",
    ),
    click.Option(
        ["library", "--format"],
        type=click.Choice([*_LIBRARIES, "safetensors"]),
        help="The library that the output is to load in; safetensors leaves all but the weights "
        "away. Default: that of the first model or base.",
    ),
    click.Option(
        ["--out-dtype"],
        type=click.Choice(EDITABLE),
        help="The dtype of the output. Default: that of the first model or base.",
    ),
    click.Option(
        ["--max-shard-size"],
        type=Size(),
        help="Split the weights into files of at most this size, such as 5GB.",
    ),
    DRY_RUN,
    *PUSHING,
)

_NAMES = (
    *("out", "library", "out_dtype", "max_shard_size", "dry_run", "push", "license"),
    *("overwrite", "on_nonfinite", "resume", "device"),
)


def output_options(given: dict[str, Any]) -> dict[str, Any]:
    """Remove the options of the output from the given values, check and return them."""
    output = taken(given, _NAMES)
    repo, out = output.get("push"), output["out"]
    check_push(repo, output.get("license"), dry_run=output.get("dry_run", False))
    if repo and out.suffix == ".safetensors":
        raise click.UsageError(f"{out} is one file; --push takes a folder, with its model card")
    return output


def may_exist(output: dict[str, Any]) -> Any:
    """Return whether an output may exist: it is replaced, or was finished by a job to resume."""
    return output.get("overwrite", False) or output.get("resume", False)


def save(
    checkpoint: Checkpoint,
    what: str,
    as_json: bool,
    *,
    out: Path,
    out_dtype: str | None = None,
    max_shard_size: int | None = None,
    library: str | None = None,
    dry_run: bool = False,
    push: str | None = None,
    license: str | None = None,
    **how: Any,
) -> None:
    """Write a checkpoint, in all processes that torchrun started, and print what was written."""
    from weightops.checkpoints.matching import convert_to
    from weightops.checkpoints.output_layout import folders_of
    from weightops.engine.ranks import torchrun

    check_known_license(push, license, folders_of(checkpoint.form).values())
    checkpoint = convert_to(checkpoint, library) if library else checkpoint
    if dry_run:
        estimate = checkpoint.estimate(out, dtype=out_dtype, max_shard_size=max_shard_size)
        echo_plan({"output": str(out), **asdict(estimate)}, as_json)
        return
    with torchrun() as ranks:
        checkpoint.save(out, dtype=out_dtype, max_shard_size=max_shard_size, ranks=ranks, **how)
        if ranks.first:
            _report(checkpoint, what, as_json, out, push_folder(out, push, license))


def _report(
    checkpoint: Checkpoint, what: str, as_json: bool, out: Path, address: dict[str, str]
) -> None:
    from weightops.algebra.provenance import provenance

    if not as_json:
        echo(f"{out}: {what}, {len(checkpoint)} tensors")
        return
    recipe = {"recipe": checkpoint.recipe} if checkpoint.recipe else {}
    echo_json({"output": str(out), **recipe, **provenance(checkpoint.form), **address})
