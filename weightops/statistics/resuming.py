"""Collect a statistic in parts, so that a killed run can be continued."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from weightops.algebra.linear_form import LinearForm
from weightops.checkpoints.checkpoint import Checkpoint
from weightops.checkpoints.opening import CheckpointLike, open_checkpoint
from weightops.checkpoints.statistic_record import record_of
from weightops.errors import WeightopsError
from weightops.evaluation.image_model import ImageModel
from weightops.statistics.collect import collect
from weightops.statistics.statistic import statistic_source
from weightops.support.atomic import check_free
from weightops.support.lazy import torch
from weightops.tasks.table import TaskLike, as_task

log = logging.getLogger("weightops")

PART = 512
"""Images of a part. It is fixed, so that a run that was continued gives the same bits."""


def collect_to(
    out: Path,
    model: CheckpointLike,
    task: TaskLike,
    kind: Any = "gram",
    *,
    images: int = 256,
    split: Any = "train",
    resume: bool = False,
    overwrite: bool = False,
    **options: Any,
) -> Checkpoint:
    """Collect a statistic of images into a file, part by part; see `collect`.

    What is done is in a hidden file beside the output, from which ``resume`` continues.

    Args:
        out: the file.
        model: the model.
        task: the task.
        kind: gram or fisher.
        images: the most images to use.
        split: the images to use.
        resume: continue a run that was killed.
        overwrite: replace an output that exists.
        options: further options of `collect`.

    Returns:
        The statistic in the file.

    Raises:
        OutputError: if the output exists, or is the model's own file.
    """
    checkpoint = open_checkpoint(model)
    inputs = [file.path for file in checkpoint.form.files]
    check_free(out, overwrite=overwrite, inputs=inputs)
    source, beside = as_task(task), out.with_name(f".{out.stem}.partial.safetensors")
    total = min(images, source.sizes[split])
    asked = {"kind": kind, "task": source.name, "source": source.source, "split": split}
    asked |= {"labels": "model", "seed": 0, **options}
    done = _opened(beside, checkpoint, asked, total) if resume else None
    built = ImageModel.open(checkpoint, options.get("device", "auto"), precision="float32")
    while done is None or record_of(done)["count"] < total:
        start = record_of(done)["count"] if done is not None else 0
        stop = min(start + PART, total)
        some = {"split": split, "start": start, "images": stop, "built": built}
        part = collect(checkpoint, source, kind, **some, **options)
        done = part if done is None else _joined(done, part)
        if stop < total:
            done.save(beside, overwrite=True)
            done = open_checkpoint(beside)
    done.save(out, overwrite=overwrite)
    beside.unlink(missing_ok=True)
    return open_checkpoint(out)


def _opened(file: Path, model: Checkpoint, asked: dict[str, Any], total: int) -> Checkpoint | None:
    """Return what a killed run left; None if it is of another model, task, option or more images.

    What a record doesn't have, such as the labels of a gram, makes no difference to it.
    """
    try:
        done = open_checkpoint(file) if file.exists() else None
    except WeightopsError:
        done = None
    record = record_of(done) if done is not None else {}
    same = all(record.get(key, value) == value for key, value in asked.items())
    same = same and record.get("count", 0) <= total
    if done is not None and same and record["model"]["fingerprint"] == model.fingerprint:
        return done
    if file.exists():
        log.warning("%s is of another run, and is left aside", file)
    return None


def _joined(one: Checkpoint, other: Checkpoint) -> Checkpoint:
    """Return the statistic of the images of two, which are means over their inputs or images."""
    first, second = record_of(one), record_of(other)
    tensors = {}
    for name in one:
        counts = [
            torch.tensor(record.get("rows", {}).get(name, record["count"]), dtype=torch.float64)
            for record in (first, second)
        ]
        both = (counts[0] + counts[1]).clamp(min=1)
        tensor = one[name]
        shares = [(count / both).to(tensor.dtype) for count in counts]
        if tensor.dim() == 3 and shares[0].dim() == 1:
            shares = [share[:, None, None] for share in shares]
        tensors[name] = tensor * shares[0] + other[name] * shares[1]
    rows = {
        name: torch.add(torch.tensor(n), torch.tensor(second["rows"][name])).tolist()
        for name, n in first.get("rows", {}).items()
    }
    record = {**first, "count": first["count"] + second["count"]}
    record |= {"rows": rows} if rows else {}
    ref = f"{first['kind']} statistic of {first['model']['ref']}"
    return Checkpoint(LinearForm.of(statistic_source(tensors, ref, record)))
