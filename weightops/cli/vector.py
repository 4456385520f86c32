"""``weightops vector``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import click

from weightops.cli.from_signature import Borrowed, command
from weightops.cli.printing import echo, echo_json
from weightops.cli.types import OneTask
from weightops.errors import printable
from weightops.support.ranges import Range

_TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
_MASK = Borrowed("weightops.search.localizing:localize", leave_out=("vector", "task"))
_LOCALIZE = click.Option(
    ["--localize"],
    type=OneTask(),
    help="Keep only the elements that this task needs, by a mask that is learned from its training "
    "images (Localize-and-Stitch, arXiv 2408.13656).",
)


@command(
    Borrowed("weightops.task_vector:TaskVector.save", only=("overwrite", "compress")),
    _MASK,
    arguments=[_LOCALIZE],
)
def vector(
    base: str,
    finetuned: str,
    *,
    out: Path | None = None,
    lora: Annotated[int, Range(min=1)] | None = None,
    select: tuple[str, ...] = (),
    allow_missing: bool = False,
    strict: bool = False,
    per_tensor: bool = False,
    dequantize: bool = False,
    json_: bool = False,
    **given: Any,
) -> None:
    """Make the task vector FINETUNED - BASE: save it, or print its size.

    Args:
        base: the pre-trained weights.
        finetuned: the fine-tuned weights.
        out: a safetensors file for the task vector, or a folder for the LoRA; without it, only
            numbers are printed.
        lora: write the nearest LoRA of this rank, for peft.
        select: only tensors whose names match a pattern, such as 'visual.*'.
        allow_missing: leave out tensors that only one of the checkpoints has.
        strict: refuse checkpoints that are configured differently, instead of warning.
        per_tensor: print the norm of each tensor, too.
        dequantize: read quantised weights in bfloat16, as `dequantized:` before a path does.
    """
    from weightops.checkpoints.opening import as_dequantised
    from weightops.support.atomic import check_free
    from weightops.task_vector import TaskVector

    mask = {p.name: given.pop(p.name) for p in _MASK.parameters() if p.name in given}
    task = given.pop("localize", None)
    if mask and task is None:
        raise click.UsageError("--localize names the task that the mask is learned for: give it")
    _check(out, lora, given.get("compress"))
    if dequantize:
        base, finetuned = as_dequantised(base), as_dequantised(finetuned)
    tau = TaskVector(base, finetuned, strict=not allow_missing, same_config=strict)
    tau = tau.select(select) if select else tau
    if out is not None:
        inputs = [file.path for file in tau.form.files]
        check_free(out, overwrite=given.get("overwrite", False), inputs=inputs)
    if task is not None:
        from weightops.search.localizing import localize

        tau = localize(tau, task, **mask)
    norms = tau.norm(per_tensor=True)
    error = _save(tau, out, lora, given) if out is not None else None
    total = math.sqrt(math.fsum(norm * norm for norm in norms.values()))
    unchanged = sum(norm == 0 for norm in norms.values())
    if json_:
        result = {
            "base": base,
            "finetuned": finetuned,
            "tensors": len(norms),
            "unchanged": unchanged,
            "norm": total,
            "relative_error": error,
            "output": str(out) if out else None,
        }
        echo_json({**result, **({"norms": norms} if per_tensor else {})})
        return
    echo(f"{len(norms)} tensors, {unchanged} of them unchanged; norm {total:.6g}")
    if error is not None:
        echo(f"stored with a relative error of {error:.3g}")
    if per_tensor:
        for name, norm in norms.items():
            echo(f"{norm:12.6g}  {printable(name)}")


def _check(out: Path | None, lora: int | None, compress: str | None) -> None:
    """Refuse options that don't go together, and outputs that can't be."""
    from weightops.checkpoints.formats.compressed import coding

    if (compress or lora) and out is None:
        raise click.UsageError("--compress and --lora say how to write: give --out, too")
    if compress and lora:
        raise click.UsageError("--lora writes an adapter, --compress a task vector: give one")
    if out is None:
        return
    if compress:
        coding(compress)
    if out.suffix in _TORCH_SUFFIXES or (lora and out.suffix == ".safetensors"):
        kind = "a folder" if lora else "a .safetensors file"
        raise click.UsageError(f"{out}: --out is {kind}")


def _save(tau: Any, out: Path, lora: int | None, given: dict[str, Any]) -> float | None:
    """Save a vector as it is, compressed or as a LoRA; return its relative error, if any."""
    from weightops.checkpoints.opening import open_ref

    if lora:
        lost: float = tau.save_lora(out, lora, **given)["relative_error"]
        return lost
    tau.save(out, **given)
    record = open_ref(out).form.sources[0].made_from.get("compressed", {})
    error: float | None = record.get("relative_error")
    return error
