"""``weightops pack``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from weightops.cli.from_signature import Borrowed, command
from weightops.cli.printing import echo_plan
from weightops.cli.signatures import read

_PACK = "weightops.merging.packing:pack"
_OWN = ("models", "out", "mask_scale")


@command(Borrowed(_PACK, leave_out=_OWN), about=read(_PACK).docstring.text)
def pack(
    models: tuple[str, ...],
    *,
    out: Path,
    names: Sequence[str] | None = None,
    mask_scale: Sequence[float] | None = None,
    json_: bool = False,
    **given: Any,
) -> None:
    """Write several models to one file.

    Args:
        models: the fine-tuned models.
        out: the .safetensors file.
        names: a name for each model. Default: the names of the files.
        mask_scale: with --method tall, the threshold of the masks, one for all models or for each.
            Default: 0.4.
    """
    from weightops.algebra.names import Each
    from weightops.merging import packing

    labels = list(names or (Path(model).name.removesuffix(".safetensors") for model in models))
    repeated = "--names is repeated, once for each model: --names A --names B"
    if len(labels) != len(models):
        raise click.UsageError(
            f"there are {len(models)} models and {len(labels)} names; {repeated}"
        )
    if len(set(labels)) != len(labels) or not all(labels):
        raise click.UsageError(f"each model has a name of its own, not {labels}; {repeated}")
    if mask_scale:
        given["mask_scale"] = mask_scale[0] if len(mask_scale) == 1 else Each(mask_scale)
    file = packing.pack(dict(zip(labels, models, strict=True)), out=out, **given)
    echo_plan({"output": str(file), "models": labels, "bytes": file.stat().st_size}, json_)
