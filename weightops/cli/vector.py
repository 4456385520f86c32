"""``weightops vector``."""

from __future__ import annotations

from pathlib import Path

import click

from weightops.cli import options


@click.command()
@click.argument("base")
@click.argument("finetuned")
@options.folder(
    "A safetensors file for the task vector, or a folder for --lora; without it, only numbers are printed."
)
@click.option(
    "--compress",
    metavar="bf16|int8|sparse:DENSITY|lowrank:RANK",
    default=None,
    help="Store it in fewer bytes, with the error that this introduces in its metadata.",
)
@click.option(
    "--lora",
    type=click.IntRange(1),
    default=None,
    metavar="RANK",
    help="Write the nearest LoRA of a rank, for peft.",
)
@click.option(
    "--fan-in-fan-out",
    is_flag=True,
    help="With --lora: weights are of shape (in, out), as in GPT-2.",
)
@click.option(
    "--select",
    multiple=True,
    metavar="PATTERN",
    help="Only tensors whose names match, such as 'visual.*'.",
)
@click.option(
    "--allow-missing", is_flag=True, help="Leave out tensors that only one of the checkpoints has."
)
@click.option("--per-tensor", is_flag=True, help="The norm of each tensor, too.")
@options.printing
def command(
    base: str,
    finetuned: str,
    out: Path | None,
    select: tuple[str, ...],
    allow_missing: bool,
    per_tensor: bool,
    compress: str | None,
    lora: int | None,
    fan_in_fan_out: bool,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Make the task vector FINETUNED - BASE: save it, or tell its size."""
    import math

    from weightops.checkpoints.opening import open_ref
    from weightops.task_vector import TaskVector

    if (compress or lora) and out is None:
        raise click.UsageError("--compress and --lora say how to write: give --out, too")
    if compress and lora:
        raise click.UsageError(
            "--lora writes an adapter, --compress a task vector: give one of them"
        )
    if fan_in_fan_out and not lora:
        raise click.UsageError("--fan-in-fan-out is for --lora")
    if out is not None and (
        out.suffix in (".pt", ".pth", ".bin", ".ckpt") or (lora and out.suffix == ".safetensors")
    ):
        raise click.UsageError(f"{out}: --out is {'a folder' if lora else 'a .safetensors file'}")
    vector = TaskVector(base, finetuned, strict=not allow_missing)
    if select:
        vector = vector.select(select)
    norms = vector.norm(per_tensor=True)
    stored: dict[str, float] = {}
    if out is not None and lora:
        stored = vector.save_lora(out, lora, fan_in_fan_out=fan_in_fan_out, overwrite=overwrite)
    elif out is not None:
        vector.save(out, overwrite=overwrite, compress=compress)
        stored = getattr(open_ref(out).form.sources[0], "made_from", {}).get("compressed", {})
    error = stored.get("relative_error")
    total = math.sqrt(math.fsum(norm * norm for norm in norms.values()))
    unchanged = sum(norm == 0 for norm in norms.values())
    result = {
        "base": base,
        "finetuned": finetuned,
        "tensors": len(norms),
        "unchanged": unchanged,
        "norm": total,
        "relative_error": error,
        "output": str(out) if out else None,
    }
    if as_json:
        options.echo_json({**result, **({"norms": norms} if per_tensor else {})})
        return
    click.echo(f"{len(norms)} tensors, {unchanged} of them unchanged; norm {total:.6g}")
    if error is not None:
        click.echo(f"stored with a relative error of {error:.3g}")
    if per_tensor:
        click.echo("\n".join(f"{norm:12.6g}  {name}" for name, norm in norms.items()))
