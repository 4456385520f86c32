"""Numbers from deltas: inner products of several of them, tensor by tensor, in one streaming pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from weightops.engine.run import Segment, Step, chunks, parallel, plan, reader, segments
from weightops.errors import MismatchError
from weightops.expression import LinearForm, ties
from weightops.kernels import Scratch


def gram(forms: Sequence[LinearForm]) -> dict[str, torch.Tensor]:
    r"""Inner products :math:`\\langle d_i, d_j \\rangle` of every two forms at every tensor that all of them have.

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

    def do(batch: list[Segment], scratch: Scratch) -> list[tuple[str, torch.Tensor]]:
        return [(segment.step.name, _products(plans[segment.step.name], segment, scratch)) for segment in batch]

    totals = {name: torch.zeros(len(forms), len(forms), dtype=torch.float64) for name in names}
    first = [steps[0] for steps in plans.values()]
    for results in parallel(segments(first), do, total=4 * sum(step.numel for step in first)):
        for name, products in results:
            totals[name] += products
    return totals


def _products(steps: Sequence[Step], segment: Segment, scratch: Scratch) -> torch.Tensor:
    """The inner products of one segment, shape ``(k, k)``."""
    readers = [reader(step, scratch) for step in steps]
    wide = any(s.specs[segment.step.name].dtype == torch.float64 for step in steps for s in step.coefficients)
    dtype = torch.float64 if wide else torch.float32
    totals = torch.zeros(len(steps), len(steps), dtype=torch.float64)
    for start, stop in chunks(segment, torch.device("cpu")):
        deltas = [scratch.get(4 + i, stop - start, dtype) for i in range(len(steps))]
        for read, delta in zip(readers, deltas, strict=True):
            read(start, stop, delta)
        for i, x in enumerate(deltas):
            for j, y in enumerate(deltas[: i + 1]):
                totals[i, j] += (x * y).sum(dtype=torch.float64)
    return totals + totals.tril(-1).T
