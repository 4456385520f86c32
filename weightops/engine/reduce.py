"""Reduce forms to numbers: inner products at each tensor, in one streaming pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from weightops.algebra.kernels import row_length
from weightops.algebra.linear_form import LinearForm, tied_names
from weightops.algebra.scratch import Scratch, Slot
from weightops.engine.evaluate import Reader, reader
from weightops.engine.plan import Segment, joint, plan, units
from weightops.engine.threads import parallel
from weightops.errors import MismatchError
from weightops.support.lazy import torch

BLOCK = 1024
"""Elements that are added up in float32. The sums of blocks are added up in float64."""


def gram(
    forms: Sequence[LinearForm], of: Callable[[torch.Tensor], torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """Return the inner products ``<d_i, d_j>`` of all pairs of forms at each common tensor.

    Blocks of 1,024 elements are multiplied in float32 (float64 for float64), and added up in
    float64. The order depends only on the shapes.

    Args:
        forms: deltas, or weights.
        of: a function that is applied to the elements first, such as ``torch.sign``.

    Returns:
        name -> float64 tensor of shape ``(k, k)`` for ``k`` forms, for the names that all forms
        have, without aliases.

    Raises:
        MismatchError: if a name has several shapes.
    """
    names = _common_names(forms)
    steps_at = dict(
        zip(names, zip(*(plan(form, names) for form in forms), strict=True), strict=True)
    )

    def do(unit: list[Segment], scratch: Scratch) -> list[tuple[str, torch.Tensor]]:
        readers = {s.step.name: reader(steps_at[s.step.name], scratch) for s in unit}
        return [
            (s.step.name, products(s, len(forms), readers[s.step.name], scratch, of)) for s in unit
        ]

    totals = {name: torch.zeros(len(forms), len(forms), dtype=torch.float64) for name in names}
    files = [file for form in forms for file in form.files]
    for results in parallel(units(map(joint, steps_at.values())), do, files=files):
        for name, matrix in results:
            totals[name] += matrix
    return totals


def _common_names(forms: Sequence[LinearForm]) -> list[str]:
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
                f"{name} has shapes {' and '.join(map(str, sorted(shapes)))}",
                hint="compare models of one architecture",
            )
    return names


def products(
    segment: Segment,
    k: int,
    read: Reader,
    scratch: Scratch,
    of: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """Return the inner products of a reader's ``k`` rows at one segment: float64, ``(k, k)``."""
    sources = segment.step.coefficients
    wide = any(source.specs[segment.step.name].dtype == torch.float64 for source in sources)
    dtype = torch.float64 if wide else torch.float32
    totals = torch.zeros(k, k, dtype=torch.float64)
    step = 2 * row_length(k)
    for start in range(segment.start, segment.stop, step):
        stop = min(start + step, segment.stop)
        rows = scratch.get(Slot.ROWS, k * (stop - start), dtype).view(k, -1)
        read(start, stop, rows.unbind())
        rows = of(rows) if of else rows
        rest_start = (stop - start) // BLOCK * BLOCK
        blocks = rows[:, :rest_start].view(k, -1, BLOCK).transpose(0, 1)
        rest = rows[:, rest_start:].double()
        totals += (torch.bmm(blocks, blocks.mT).sum(0, dtype=torch.float64) + rest @ rest.mT).cpu()
    return totals.tril() + totals.tril(-1).mT


def sums(rows: torch.Tensor) -> torch.Tensor:
    """Return the sum of each row in float64, on CPU, the same for any number of threads."""
    rest_start = rows.shape[1] // BLOCK * BLOCK
    rest = rows[:, rest_start:].sum(1, dtype=torch.float64)
    blocks = rows[:, :rest_start].view(len(rows), -1, BLOCK).sum(2)
    return blocks.sum(1, dtype=torch.float64).add_(rest).cpu()


def cosine(products: torch.Tensor) -> float:
    """Return the cosine of two vectors from their `gram`, shape ``(2, 2)``; NaN if one is zero."""
    norms = math.sqrt(float(products[0, 0])) * math.sqrt(float(products[1, 1]))
    return float(products[0, 1]) / norms if norms else math.nan
