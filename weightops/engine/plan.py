"""TODO."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, TypeVar

from weightops.algebra.linear_form import LinearForm
from weightops.algebra.source import Source

log = logging.getLogger("weightops")
T = TypeVar("T")

SEGMENT = 1 << 20
"""Elements that one thread takes at a time. A fixed partition: results don't depend on the number of threads."""


class Step(NamedTuple):
    """What to compute at one tensor: the anchor, and each source's coefficient."""

    name: str
    numel: int
    coefficients: Mapping[Source, float]
    anchor: Source | None
    keep_anchor: bool


class Segment(NamedTuple):
    """Elements ``start`` to ``stop`` of one tensor."""

    step: Step
    start: int
    stop: int


def plan(form: LinearForm, names: Iterable[str] | None = None) -> list[Step]:
    """The steps that evaluate a form at some of its names, or at all."""
    return [_step(form, name) for name in (form.specs if names is None else names)]


def _step(form: LinearForm, name: str) -> Step:
    return _anchored(
        name, form.specs[name].numel, form.coefficients(name), form.base, form.space == "weights"
    )


def combined(steps: Sequence[Step], coefficients: Sequence[float]) -> dict[Source, float]:
    """The sources of a linear combination of what steps of one tensor give, and their coefficients."""
    totals: dict[Source, float] = {}
    for step, coefficient in zip(steps, coefficients, strict=True):
        for source, value in step.coefficients.items():
            totals[source] = totals.get(source, 0.0) + coefficient * value
    return totals


def _anchored(
    name: str, numel: int, coefficients: Mapping[Source, float], base: Source | None, whole: bool
) -> Step:
    """A step whose anchor is the base where it takes part, else what is subtracted most."""
    used = {source: value for source, value in coefficients.items() if value}
    weights = [source for source in used if source.space == "weights"]
    anchor = base if base in used else min(weights, key=lambda source: used[source], default=None)
    return Step(name, numel, used, anchor, whole)


def units(steps: Iterable[Step], segment: int | None = None) -> list[list[Segment]]:
    """Work for one thread at a time, the largest first: a part of a large tensor, several small ones, or one that is computed."""
    segment = segment or SEGMENT
    done: list[list[Segment]] = []
    batch: list[Segment] = []
    held = 0
    for step in steps:
        parts = [
            Segment(step, a, min(a + segment, step.numel))
            for a in range(0, max(step.numel, 1), segment)
        ]
        if any(source.computed for source in step.coefficients):
            done.append(parts)
            continue
        done += [[part] for part in parts[:-1]]
        batch.append(parts[-1])
        held += parts[-1].stop - parts[-1].start
        if held >= segment:
            done.append(batch)
            batch, held = [], 0
    return sorted([*done, batch] if batch else done, key=size, reverse=True)


def size(unit: Iterable[Segment]) -> int:
    """Elements of a unit."""
    return sum(segment.stop - segment.start for segment in unit)
