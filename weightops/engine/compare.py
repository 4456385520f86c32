"""Compare two forms tensor by tensor, in one streaming pass."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

from weightops.algebra.dtypes import is_editable
from weightops.algebra.linear_form import LinearForm, tied_names
from weightops.algebra.scratch import Scratch, Slot
from weightops.engine.evaluate import Reader, reader
from weightops.engine.plan import Segment, joint, plan, units
from weightops.engine.threads import parallel
from weightops.support.lazy import torch

_ROUNDINGS = 8.0
"""Spacings of the written dtype that another order of the same sum may differ by."""

_REDUCED_PRECISION = 2.0**-7
"""The error, relative to a change, of computing the change in bfloat16."""

_LEAST_BIAS = 1e-4
_SIGNIFICANT = 6.0
"""A scale that is off by less, or by fewer standard errors, may be due to rounding."""

_CHUNK = 1 << 16


@dataclass
class Difference:
    """The difference of a tensor from what it should be.

    Attributes:
        count: the number of elements.
        other: how many of them have other bits.
        most: the largest absolute difference; infinite where only one is NaN or infinite.
        outside: how many elements differ by more than another order of rounding can make of them.
        error: the sum of the squared differences.
        size: the sum of the squares of what it should be.
        change: the sum of the squared changes from the base; 0 without a base.
        along_size: the inner product of the differences with what the tensor should be.
        along_change: the inner product of the differences with the changes from the base.
    """

    count: int = 0
    other: int = 0
    most: float = 0.0
    outside: int = 0
    error: float = 0.0
    size: float = 0.0
    change: float = 0.0
    along_size: float = 0.0
    along_change: float = 0.0

    def add(self, part: Difference) -> None:
        """Add the difference of other elements of the tensor."""
        most = max(self.most, part.most)
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(part, field.name))
        self.most = most

    @property
    def relative(self) -> float:
        """The norm of the difference over that of what the tensor should be."""
        return math.sqrt(self.error / self.size) if self.size else math.inf

    @property
    def scale(self) -> float | None:
        """The coefficient with which the change is in the tensor: 1 if it is, 0 if it isn't."""
        return 1.0 + self.along_change / self.change if self.change else None

    @property
    def is_rounding(self) -> bool:
        """Whether rounding, in another order or precision, can have made all of the difference.

        Errors of rounding are small for each element, and aren't aligned with the weights or the
        change: so a factor of 1.001 isn't one, even where bfloat16 shows little of it.
        """
        reduced = self.error <= _REDUCED_PRECISION**2 * self.change
        if not math.isfinite(self.error) or (self.outside and not reduced):
            return False
        return not any(
            self._is_biased(along, of)
            for along, of in ((self.along_size, self.size), (self.along_change, self.change))
        )

    def _is_biased(self, along: float, of: float) -> bool:
        """Return whether the difference has a part along a direction that is more than chance."""
        if not of or not self.error or abs(along) <= _LEAST_BIAS * of:
            return False
        correlation = along / math.sqrt(of * self.error)
        return abs(correlation) * math.sqrt(self.count) > _SIGNIFICANT


def compare(
    expected: LinearForm, actual: LinearForm, base: LinearForm | None = None
) -> dict[str, Difference]:
    """Return the difference of each tensor of one form from that of another.

    Args:
        expected: what the tensors should be, rounded to the dtypes of its specs.
        actual: the tensors, whose shapes and dtypes are these.
        base: weights that ``expected`` was changed from, in which scales are measured.

    Returns:
        name -> difference, for the names that both forms have, without those that are aliases in
        both.
    """
    tied = [tied_names(form) for form in (expected, actual)]
    names = [n for n in actual.specs if n in expected.specs and not all(n in t for t in tied)]
    forms, is_delta = [expected, actual], expected.space == "delta"
    steps = {name: [*plan(expected, [name]), *plan(actual, [name])] for name in names}
    if base is not None:
        for name in names:
            if name in base.specs and base.specs[name].shape == actual.specs[name].shape:
                steps[name] += plan(base, [name])
        forms.append(base)

    def do(unit: list[Segment], scratch: Scratch) -> list[tuple[str, Difference]]:
        found, read, step = [], None, None
        for segment in unit:
            name = segment.step.name
            if read is None or segment.step is not step:
                step, read = segment.step, reader(steps[name], scratch)
            found.append((name, _compare_segment(segment, read, _rows(segment), scratch, is_delta)))
        return found

    def _rows(segment: Segment) -> list[torch.dtype]:
        name = segment.step.name
        return [form.specs[name].dtype for form in forms[: len(steps[name])]]

    totals = {name: Difference() for name in names}
    files = [file for form in forms for file in form.files]
    for results in parallel(units(map(joint, steps.values())), do, files=files):
        for name, difference in results:
            totals[name].add(difference)
    return totals


def _compare_segment(
    segment: Segment, read: Reader, dtypes: Sequence[torch.dtype], scratch: Scratch, is_delta: bool
) -> Difference:
    """Return the difference of the elements of one segment."""
    size = segment.stop - segment.start
    rows = [scratch.get(Slot.RESULT, size, dtype, index=i) for i, dtype in enumerate(dtypes)]
    read(segment.start, segment.stop, rows)
    total = Difference(count=size)
    for parts in _chunks(rows):
        total.add(_numbers(parts, is_editable(dtypes[0]), is_delta))
    return total


def _chunks(rows: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    for start in range(0, len(rows[0]), _CHUNK):
        yield [row[start : start + _CHUNK] for row in rows]


def _numbers(parts: Sequence[torch.Tensor], are_floats: bool, is_delta: bool) -> Difference:
    expected, actual, *base = parts
    width = expected.element_size()
    bits = [part.view(torch.uint8).view(-1, width) for part in (expected, actual)]
    differs = (bits[0] != bits[1]).any(1)
    other = int(differs.sum())
    if not are_floats:
        return Difference(other=other, outside=other, error=math.inf if other else 0.0)
    should = expected.double()
    change = should if is_delta else torch.zeros_like(should)
    change = should - base[0].double() if base else change
    finite = [torch.nan_to_num(x, nan=0.0, posinf=0.0, neginf=0.0) for x in (should, change)]
    size, changed = (float(x.square().sum()) for x in finite)
    if not other:
        return Difference(size=size, change=changed)
    error = torch.where(differs, actual.double() - should, 0.0)
    error[~error.isfinite()] = math.inf
    spacing = torch.finfo(expected.dtype).eps * _ROUNDINGS
    allowed = spacing * (should.abs() + change.abs() + change.square().mean().sqrt())
    lengths = error.abs()
    return Difference(
        other=other,
        most=float(lengths.max()),
        outside=int((lengths > allowed).sum()),
        error=float(error.square().sum()),
        size=size,
        change=changed,
        along_size=float(error @ finite[0]),
        along_change=float(error @ finite[1]),
    )
