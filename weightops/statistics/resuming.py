"""Collect a statistic in parts, so that a killed run can be continued."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from weightops.algebra.linear_form import LinearForm
from weightops.checkpoints.checkpoint import Checkpoint
from weightops.checkpoints.opening import CheckpointLike, open_checkpoint
from weightops.checkpoints.statistic_record import record_of
from weightops.errors import OutputError, WeightopsError
from weightops.evaluation.perplexity import token_blocks
from weightops.statistics.collect import check_request, statistic_of
from weightops.statistics.runs import Run, run_on
from weightops.statistics.statistic import statistic_source
from weightops.support.atomic import check_free
from weightops.support.lazy import torch
from weightops.support.text import portable
from weightops.tasks.table import TaskLike, as_task

log = logging.getLogger("weightops")

PART = 512
"""Images of a part. It is fixed, so that a run that was continued gives the same bits."""


def collect_to(
    out: Path,
    model: CheckpointLike,
    task: TaskLike | None = None,
    kind: Any = "gram",
    *,
    text: str | Path | None = None,
    images: int = 256,
    split: Any = "train",
    device: str = "auto",
    resume: bool = False,
    overwrite: bool = False,
    **options: Any,
) -> Checkpoint:
    """Collect a statistic into a file, of images part by part; see `collect`.

    What is done is in a hidden file beside the output, from which ``resume`` continues.

    Args:
        out: the file.
        model: the model.
        task: the task.
        kind: gram or fisher.
        text: for language models, a text instead of a task; it is one part.
        images: the most images, or blocks of text, to use.
        split: the images to use.
        device: where to compute.
        resume: continue a run that was killed; where it is finished, nothing is done.
        overwrite: replace an output that exists.
        options: labels, batch_size and seed of `collect`.

    Returns:
        The statistic in the file.

    Raises:
        OutputError: if the output exists, or is the model's own file; with ``resume``, if what is
            there is damaged or of another run.
    """
    check_request(kind, images=images, split=split, **options)
    checkpoint = open_checkpoint(model)
    is_there = resume and not overwrite and out.is_file()
    if not is_there:
        inputs = [file.path for file in checkpoint.form.files]
        check_free(out, overwrite=overwrite, inputs=inputs)
    asked = {"kind": kind, "labels": "model", "seed": 0, **options}
    if text is None:
        task = as_task(task or "")
        total = min(images, task.sizes[split])
        asked |= {"task": task.name, "source": task.source, "split": split}
    else:
        total = min(images, len(token_blocks(checkpoint, text)))
        asked |= {"text": portable(str(text))}
    if is_there:
        return _left(out, checkpoint, asked, total, is_whole=True)
    beside = out.with_name(f".{out.stem}.partial.safetensors")
    done = None
    if resume and beside.exists():
        done = _left(beside, checkpoint, asked, total)
    elif beside.exists():
        log.warning("%s, a part of an unfinished run, is replaced", beside)
    run = run_on(checkpoint, task, text, split, total, device)

    def collected(part: Run) -> Checkpoint:
        return statistic_of(part, checkpoint, kind, **options)

    _collect_rest(run, done, beside, kind, collected).save(out, overwrite=overwrite)
    beside.unlink(missing_ok=True)
    return open_checkpoint(out)


def _collect_rest(
    run: Run,
    done: Checkpoint | None,
    beside: Path,
    what: str,
    collected: Callable[[Run], Checkpoint],
) -> Checkpoint:
    """Return a whole statistic, of which some may be done, with its parts in a file on the way."""
    start, total = record_of(done)["count"] if done is not None else 0, len(run.chosen)
    size = total if "text" in run.data else PART
    with run.progress(what, done=start) as bar:
        while done is None or start < total:
            stop = min(start + size, total)
            part = collected(run.part(start, stop, bar))
            done = part if done is None else _joined(done, part)
            start = stop
            if stop < total:
                done.save(beside, overwrite=True)
                done = open_checkpoint(beside)
    return done


def _left(
    file: Path, model: Checkpoint, asked: Mapping[str, Any], total: int, *, is_whole: bool = False
) -> Checkpoint:
    """Return what a run has left: its finished output, or a part of it.

    Raises:
        OutputError: if it is damaged, or of another run, with what differs.
    """
    remedies = ("remove it, or begin again without resume=True", "overwrite=True replaces it")
    hint = remedies[is_whole]
    try:
        left = open_checkpoint(file)
    except WeightopsError as error:
        raise OutputError(error.fact, hint=hint) from error
    record = record_of(left)
    if not {"model", "count"} <= set(record):
        raise OutputError(f"{file} is no statistic of weightops", hint=hint)
    other = _differences(record, model, asked)
    if record["count"] > total or (is_whole and record["count"] < total):
        other.append(f"images {record['count']}, not {total}")
    if other:
        raise OutputError(f"{file} is of another run: {'; '.join(other)}", hint=hint)
    return left


def _differences(
    record: Mapping[str, Any], model: Checkpoint, asked: Mapping[str, Any]
) -> list[str]:
    """Return in what a record differs from what is asked for.

    What a record doesn't have, such as the labels of a gram, makes no difference to it.
    """
    own = record["model"]
    found = []
    if own["fingerprint"] != model.fingerprint:
        this = f"{portable(model.ref)} ({model.fingerprint})"
        found.append(f"model {own['ref']} ({own['fingerprint']}), not {this}")
    if "merged_before" in record:
        found.append("taken after merged layers")
    for name, value in asked.items():
        same_name = name != "source" or record.get("task") == asked["task"]
        if record.get(name, value) != value and same_name:
            found.append(f"{name} {record[name]}, not {value}")
    return found


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
