"""Numbers from deltas: inner products of several of them, tensor by tensor, in one streaming pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from weightops.engine.run import Segment, Step, evaluate, parallel, plan, segments
from weightops.expression import LinearForm
from weightops.kernels import Scratch


def gram(forms: Sequence[LinearForm]) -> dict[str, torch.Tensor]:
    r"""Inner products :math:`\\langle d_i, d_j \\rangle` of every two forms at every tensor that all of them have.

    Returns:
        name -> float64 tensor of shape ``(k, k)`` for ``k`` forms. Products are rounded in float32 (float64 for float64),
        sums are float64, in an order that depends on nothing but the shapes.
    """
    names = [name for name in forms[0].specs if all(name in form.specs for form in forms)]
    plans: dict[str, list[Step]] = {name: [] for name in names}
    for form in forms:
        for step in plan(form, names):
            plans[step.name].append(step)
    k = len(forms)
    pairs = [(i, j) for i in range(k) for j in range(i + 1)]

    def do(batch: list[Segment], scratch: Scratch) -> list[tuple[str, list[torch.Tensor]]]:
        results = []
        for segment in batch:
            name = segment.step.name
            dtype = torch.float64 if forms[0].specs[name].dtype == torch.float64 else torch.float32
            deltas = []
            for step in plans[name]:
                out = torch.empty(segment.stop - segment.start, dtype=dtype)
                evaluate(Segment(step, segment.start, segment.stop), out, scratch)
                deltas.append(out)
            results.append((name, [(deltas[i] * deltas[j]).sum(dtype=torch.float64) for i, j in pairs]))
        return results

    totals = {name: torch.zeros(k, k, dtype=torch.float64) for name, steps in plans.items() if len(steps) == k}
    first = [steps[0] for name, steps in plans.items() if name in totals]
    for results in parallel(segments(first), do, total=4 * sum(step.numel for step in first)):
        for name, values in results:
            for (i, j), value in zip(pairs, values, strict=True):
                totals[name][i, j] += value
    return {name: lower + lower.tril(-1).T for name, lower in totals.items()}
