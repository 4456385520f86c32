"""Numbers from deltas: inner products of several of them, tensor by tensor, in one streaming pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from weightops.engine.run import Reader, Segment, parallel, plan, reader, units
from weightops.errors import MismatchError
from weightops.expression import LinearForm, ties
from weightops.kernels import CHUNK, Scratch


def gram(
    forms: Sequence[LinearForm], of: Callable[[torch.Tensor], torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    r"""Inner products :math:`\\langle d_i, d_j \\rangle` of every two forms at every tensor that all of them have.

    Args:
        forms: deltas, or weights.
        of: a function of the elements to take the products of, such as ``torch.sign``.

    Returns:
        name -> float64 tensor of shape ``(k, k)`` for ``k`` forms. Products are rounded in float32 (float64 for float64),
        sums are float64, in an order that depends on nothing but the shapes.
    """
    tied = [ties(form) for form in forms]
    names = [
        name
        for name in forms[0].specs
        if all(name in form.specs for form in forms) and not all(name in aliases for aliases in tied)
    ]
    for name in names:
        shapes = {form.specs[name].shape for form in forms}
        if len(shapes) > 1:
            raise MismatchError(
                f"{name} has shapes {' and '.join(map(str, sorted(shapes)))}: vectors of different architectures"
            )
    plans = dict(zip(names, zip(*(plan(form, names) for form in forms), strict=True), strict=True))

    def do(unit: list[Segment], scratch: Scratch) -> list[tuple[str, torch.Tensor]]:
        readers = {segment.step.name: [reader(step, scratch) for step in plans[segment.step.name]] for segment in unit}
        return [(s.step.name, products(s, readers[s.step.name], scratch, of)) for s in unit]

    totals = {name: torch.zeros(len(forms), len(forms), dtype=torch.float64) for name in names}
    every = [
        replace(steps[0], coefficients={s: 1.0 for step in steps for s in step.coefficients})
        for steps in plans.values()
    ]
    for results in parallel(units(every), do):
        for name, found in results:
            totals[name] += found
    return totals


def products(
    segment: Segment,
    readers: Sequence[Reader],
    scratch: Scratch,
    of: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """The inner products of one segment of what the readers give, float64, shape ``(k, k)``."""
    wide = any(s.specs[segment.step.name].dtype == torch.float64 for s in segment.step.coefficients)
    dtype = torch.float64 if wide else torch.float32
    totals = torch.zeros(len(readers), len(readers), dtype=torch.float64)
    for start in range(segment.start, segment.stop, CHUNK):
        stop = min(start + CHUNK, segment.stop)
        deltas = [scratch.get(4 + i, stop - start, dtype) for i in range(len(readers))]
        for read, delta in zip(readers, deltas, strict=True):
            read(start, stop, delta)
        deltas = [of(delta) for delta in deltas] if of else deltas
        for i, x in enumerate(deltas):
            for j, y in enumerate(deltas[: i + 1]):
                totals[i, j] += _sum(x * y)
    return totals + totals.tril(-1).T


def _sum(values: torch.Tensor) -> torch.Tensor:
    """The sum in float64 of sums over rows of 1,024, which don't depend on threads."""
    whole = len(values) // 1024 * 1024
    return values[:whole].view(-1, 1024).sum(1).sum(dtype=torch.float64) + values[whole:].sum(dtype=torch.float64)
