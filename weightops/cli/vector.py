"""``weightops vector``."""

from __future__ import annotations

from pathlib import Path

import click

from weightops.cli import options


@click.command()
@click.argument("base")
@click.argument("finetuned")
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    default=None,
    help="A safetensors file for the task vector; without it, only numbers are printed.",
)
@click.option("--select", multiple=True, metavar="PATTERN", help="Only tensors whose names match, such as 'visual.*'.")
@click.option("--allow-missing", is_flag=True, help="Leave out tensors that only one of the checkpoints has.")
@click.option("--per-tensor", is_flag=True, help="The norm of each tensor, too.")
@options.writing
@options.printing
def command(
    base: str,
    finetuned: str,
    out: Path | None,
    select: tuple[str, ...],
    allow_missing: bool,
    per_tensor: bool,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Make the task vector FINETUNED - BASE: save it, or tell its size."""
    import math

    from weightops.task_vector import TaskVector

    vector = TaskVector(base, finetuned, strict=not allow_missing)
    if select:
        vector = vector.select(select)
    norms = vector.norm(per_tensor=True)
    if out is not None:
        vector.save(out, overwrite=overwrite)
    total = math.sqrt(math.fsum(norm * norm for norm in norms.values()))
    unchanged = sum(norm == 0 for norm in norms.values())
    result = {
        "base": base,
        "finetuned": finetuned,
        "tensors": len(norms),
        "unchanged": unchanged,
        "norm": total,
        "output": str(out) if out else None,
    }
    if as_json:
        options.echo_json({**result, **({"norms": norms} if per_tensor else {})})
        return
    click.echo(f"{len(norms)} tensors, {unchanged} of them unchanged; norm {total:.6g}")
    if per_tensor:
        click.echo("\n".join(f"{norm:12.6g}  {name}" for name, norm in norms.items()))
