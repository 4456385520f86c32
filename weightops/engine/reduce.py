"""Numbers from deltas: inner products of several of them, tensor by tensor, in one streaming pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from weightops.algebra.kernels import row_length
from weightops.algebra.linear_form import LinearForm, tied_names
from weightops.algebra.scratch import Scratch, Slot
from weightops.engine.evaluate import Reader, parallel, reader
from weightops.engine.plan import Segment, plan, units
from weightops.errors import MismatchError

BLOCK = 1024
"""Elements that are added up in float32; the sums of blocks are added up in float64."""


def gram(
    forms: Sequence[LinearForm], of: Callable[[torch.Tensor], torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    r"""Inner products :math:`\\langle d_i, d_j \\rangle` of every two forms at every tensor that all of them have.

    Args:
        forms: deltas, or weights.
        of: a function of the elements to take the products of, such as ``torch.sign``.

    Returns:
        name -> float64 tensor of shape ``(k, k)`` for ``k`` forms. Blocks of 1,024 elements are multiplied in float32 (float64
            for float64), and added up in float64, in an order that depends on nothing but the shapes.
    """
    tied = [tied_names(form) for form in forms]
    names = [
        name
        for name in forms[0].specs
        if all(name in form.specs for form in forms)
        and not all(name in aliases for aliases in tied)
    ]
    for name in names:
        shapes = {form.specs[name].shape for form in forms}
        if len(shapes) > 1:
            raise MismatchError(
                f"{name} has shapes {' and '.join(map(str, sorted(shapes)))}: vectors of different architectures"
            )
    plans = dict(zip(names, zip(*(plan(form, names) for form in forms), strict=True), strict=True))

    def do(unit: list[Segment], scratch: Scratch) -> list[tuple[str, torch.Tensor]]:
        readers = {segment.step.name: reader(plans[segment.step.name], scratch) for segment in unit}
        return [
            (s.step.name, products(s, len(forms), readers[s.step.name], scratch, of)) for s in unit
        ]

    totals = {name: torch.zeros(len(forms), len(forms), dtype=torch.float64) for name in names}
    every = [
        steps[0]._replace(coefficients={s: 1.0 for step in steps for s in step.coefficients})
        for steps in plans.values()
    ]
    for results in parallel(units(every), do):
        for name, found in results:
            totals[name] += found
    return totals


def products(
    segment: Segment,
    k: int,
    read: Reader,
    scratch: Scratch,
    of: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """The inner products of one segment of the ``k`` rows that a reader gives, float64, shape ``(k, k)``."""
    wide = any(s.specs[segment.step.name].dtype == torch.float64 for s in segment.step.coefficients)
    dtype = torch.float64 if wide else torch.float32
    totals = torch.zeros(k, k, dtype=torch.float64)
    step = 2 * row_length(k)
    for start in range(segment.start, segment.stop, step):
        stop = min(start + step, segment.stop)
        rows = scratch.get(Slot.ROWS, k * (stop - start), dtype).view(k, -1)
        read(start, stop, rows.unbind())
        rows = of(rows) if of else rows
        whole = (stop - start) // BLOCK * BLOCK
        blocks = rows[:, :whole].view(k, -1, BLOCK).transpose(0, 1)
        rest = rows[:, whole:].double()
        totals += (torch.bmm(blocks, blocks.mT).sum(0, dtype=torch.float64) + rest @ rest.mT).cpu()
    return totals.tril() + totals.tril(-1).mT


def sums(rows: torch.Tensor) -> torch.Tensor:
    """The sum of each row in float64, on CPU, of sums over `BLOCK` elements, which don't depend on threads."""
    whole = rows.shape[1] // BLOCK * BLOCK
    ends = rows[:, whole:].sum(1, dtype=torch.float64)
    return (
        rows[:, :whole]
        .view(len(rows), -1, BLOCK)
        .sum(2)
        .sum(1, dtype=torch.float64)
        .add_(ends)
        .cpu()
    )
