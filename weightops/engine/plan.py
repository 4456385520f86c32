"""Plan the evaluation of a form, before any tensor is read.

A `Step` names the sources that are combined at one tensor, and their coefficients. Small tensors
that are computed alike can be joined into one step. Steps are cut into segments, and segments are
gathered into units, each of them work for one thread. `evaluate` then computes the units, and
`write` puts the results into files.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

from weightops.algebra.kernels import PIECE
from weightops.algebra.linear_form import LinearForm
from weightops.algebra.source import Source, Spec

SEGMENT = 1 << 20
"""Elements of a segment. It is fixed, so that results don't depend on the number of threads."""


_SMALL = SEGMENT >> 4
"""Elements up to which a tensor is joined with others."""


class Step(NamedTuple):
    """The computation of one tensor, or of several that are computed alike, one after another.

    Attributes:
        name: the name of the tensor, or of the first.
        numel: the number of elements, of all of them.
        coefficients: each source's coefficient.
        anchor: the weights that others are taken relative to, if there are any.
        keep_anchor: the anchor itself is a part of the sum.
        run: name -> number of elements of the tensors that are joined; empty for one tensor.
    """

    name: str
    numel: int
    coefficients: Mapping[Source, float]
    anchor: Source | None
    keep_anchor: bool
    run: Mapping[str, int] = {}


class Segment(NamedTuple):
    """Elements ``start`` to ``stop`` of one tensor."""

    step: Step
    start: int
    stop: int


def plan(form: LinearForm, names: Iterable[str] | None = None) -> list[Step]:
    """Return the steps that evaluate a form at the given names; by default, at all names."""
    keep_anchor = form.space == "weights"
    return [
        anchored_step(n, form.specs[n].numel, form.coefficients(n), form.base, keep_anchor)
        for n in (form.specs if names is None else names)
    ]


def anchored_step(
    name: str,
    numel: int,
    coefficients: Mapping[Source, float],
    base: Source | None,
    keep_anchor: bool,
) -> Step:
    """Return a step whose anchor is the base, or else the weights that are subtracted most."""
    used = {source: value for source, value in coefficients.items() if value}
    weights = [source for source in used if source.space == "weights"]
    anchor = base if base in used else min(weights, key=lambda source: used[source], default=None)
    return Step(name, numel, used, anchor, keep_anchor)


def joined(steps: Iterable[Step], specs: Mapping[str, Spec]) -> Iterator[Step]:
    """Yield the steps, small neighbours joined that have the same coefficients and dtypes.

    Args:
        steps: steps of one tensor each.
        specs: name -> shape and dtype of the results.
    """
    for alike, group in groupby(steps, lambda step: _kind(step, specs)):
        if alike is None:
            yield from group
            continue
        run: list[Step] = []
        numel = 0
        for step in group:
            if numel + step.numel > PIECE:
                yield _join(run)
                run, numel = [], 0
            run.append(step)
            numel += step.numel
        yield _join(run)


def _kind(step: Step, specs: Mapping[str, Spec]) -> object:
    """Return what is equal for steps that can be joined; None for a step that can't be."""
    sources = step.coefficients
    if not 0 < step.numel <= _SMALL or any(source.computed for source in sources):
        return None
    dtypes = [source.specs[step.name].dtype_name for source in sources]
    return specs[step.name].dtype_name, list(sources.items()), step.anchor, dtypes


def _join(steps: Sequence[Step]) -> Step:
    first = steps[0]
    if len(steps) == 1:
        return first
    run = {step.name: step.numel for step in steps}
    return first._replace(numel=sum(run.values()), run=run)


def joint(steps: Sequence[Step]) -> Step:
    """Return a step with all sources of the steps of one tensor, for the division into units."""
    sources = {source: 1.0 for step in steps for source in step.coefficients}
    return steps[0]._replace(coefficients=sources)


def combined_coefficients(
    steps: Sequence[Step], coefficients: Sequence[float]
) -> dict[Source, float]:
    """Return source -> coefficient of a linear combination of steps, all of one tensor."""
    totals: dict[Source, float] = {}
    for step, coefficient in zip(steps, coefficients, strict=True):
        for source, value in step.coefficients.items():
            totals[source] = totals.get(source, 0.0) + coefficient * value
    return totals


def units(steps: Iterable[Step], segment_length: int | None = None) -> list[list[Segment]]:
    """Gather the segments of steps into units of work, the largest unit first.

    A unit is one segment of a large tensor, or several small tensors, or the whole of a tensor
    that a source computes, as this source is then opened once.
    """
    length = segment_length or SEGMENT
    complete: list[list[Segment]] = []
    batch: list[Segment] = []
    batch_numel = 0
    for step in steps:
        starts = range(0, max(step.numel, 1), length)  # an empty tensor has one segment, too
        segments = [Segment(step, start, min(start + length, step.numel)) for start in starts]
        if any(source.computed for source in step.coefficients):
            complete.append(segments)
            continue
        complete += [[segment] for segment in segments[:-1]]
        batch.append(segments[-1])
        batch_numel += unit_numel(segments[-1:])
        if batch_numel >= length:
            complete.append(batch)
            batch, batch_numel = [], 0
    return sorted([*complete, batch] if batch else complete, key=unit_numel, reverse=True)


def unit_numel(unit: Iterable[Segment]) -> int:
    """Return the number of elements of a unit."""
    return sum(segment.stop - segment.start for segment in unit)
