"""Several models in one file: a base, one vector for all tasks, and a mask for each of them.

A task's weights are ``base + scale_i (mask_i * unified)``. The masks take a bit for each weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from weightops.algebra.dtypes import accumulator
from weightops.algebra.scratch import Scratch
from weightops.algebra.source import ComputedSource, Source, Spec
from weightops.errors import CheckpointError
from weightops.support.lazy import np, torch
from weightops.support.registry import unknown

BASE, UNIFIED, MASKS = "base/", "unified/", "masks/"
"""Prefixes of the stored tensors: the base's, the unified vector's, and the masks, which are uint8
of shape ``(tasks, ceil(elements / 8))``, the first element in the highest bit."""

RECORD = "packed"
"""The key in the provenance of a file under which tasks, scales and ties are."""


def packed_record(made_from: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the record of a file of several models; None for any other file."""
    base = made_from.get("base")
    record = base.get(RECORD) if isinstance(base, Mapping) else None
    return record if isinstance(record, Mapping) else None


class PackedSource(ComputedSource):
    """The weights of one task in a file of several, put together when they are read.

    Args:
        stored: the tensors in the file.
        record: the tasks, their scales, and the ties.
        task: the name of the task; None if none was named.

    Raises:
        CheckpointError: if no task was named, or the file isn't sound.
        UnknownNameError: if the file has no such task.
    """

    def __init__(self, stored: Source, record: Mapping[str, Any], task: str | None) -> None:
        tasks, scales, ties = _checked(stored, record)
        if task is None:
            raise CheckpointError(
                f"{stored.ref} holds the models of {len(tasks)} tasks: {', '.join(tasks)}",
                hint=f"name one of them, such as {stored.ref}:{tasks[0]}",
            )
        if task not in tasks:
            raise unknown(f"task in {stored.ref}", task, tasks)
        self._stored, self._index = stored, tasks.index(task)
        self._scale = scales[self._index]
        self.ref, self.files = f"{stored.ref}:{task}", stored.files
        own = {n.removeprefix(BASE): s for n, s in stored.specs.items() if n.startswith(BASE)}
        self.ties = {alias: name for alias, name in ties.items() if name in own}
        self.specs = {**own, **{alias: own[name] for alias, name in self.ties.items()}}
        self.identity = None if stored.identity is None else ("packed", stored.identity, task)

    def open(self, name: str, scratch: Scratch) -> Callable[[int, int], torch.Tensor]:
        name = self.ties.get(name, name)
        base = self._stored.open(BASE + name, scratch)
        if UNIFIED + name not in self._stored.specs:
            return base
        unified = self._stored.open(UNIFIED + name, scratch)
        bits = self._stored.read(MASKS + name)[self._index].numpy()
        dtype = accumulator(self.specs[name].dtype)

        def elements(start: int, stop: int) -> torch.Tensor:
            first = start // 8 * 8
            kept = np.unpackbits(bits[start // 8 : -(-stop // 8)])[start - first : stop - first]
            change = unified(start, stop).to(scratch.device, dtype) * self._scale
            mask = torch.from_numpy(kept).to(scratch.device, dtype)
            return base(start, stop).to(scratch.device, dtype) + change.mul_(mask)

        return elements


def _checked(
    stored: Source, record: Mapping[str, Any]
) -> tuple[list[str], list[float], dict[str, str]]:
    """Return the tasks, scales and ties of a record.

    Raises:
        CheckpointError: if they aren't sound, or the tensors don't belong to each other.
    """
    tasks, scales, ties = record.get("tasks"), record.get("scales"), record.get("ties")
    sound = (
        isinstance(tasks, list)
        and isinstance(scales, list)
        and isinstance(ties, dict)
        and tasks
        and len(scales) == len(tasks) == len(set(map(str, tasks)))
        and all(isinstance(task, str) for task in (*tasks, *ties, *ties.values()))
        and all(isinstance(scale, float) and math.isfinite(scale) for scale in scales)
    )
    if not sound:
        raise CheckpointError(f"{stored.ref} holds several models, and its metadata aren't sound")
    assert isinstance(tasks, list)
    assert isinstance(scales, list)
    assert isinstance(ties, dict)
    for name, spec in stored.specs.items():
        if name.startswith(UNIFIED):
            inner = name.removeprefix(UNIFIED)
            base, masks = stored.specs.get(BASE + inner), stored.specs.get(MASKS + inner)
            width = -(-spec.numel // 8)
            if (
                base is None
                or base.shape != spec.shape
                or not base.is_editable
                or masks != Spec((len(tasks), width), "uint8")
            ):
                raise CheckpointError(f"{stored.ref} is damaged at {inner}")
    return tasks, scales, ties
