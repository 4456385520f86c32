"""Methods that find the task vector which disturbs the tasks least: WUDI and DOGE."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from weightops.errors import OptionError
from weightops.merging.methods.kept_elements import Cutoff
from weightops.merging.methods.method import whole
from weightops.merging.methods.spectral import decompose
from weightops.merging.methods.trimming import Count, Scope, largest_elements
from weightops.support.lazy import torch

Solver = Literal["adam", "exact"]
Rest = Literal["mean", "sum", "none"]

_BETAS, _EPSILON = (0.9, 0.999), 1e-8
"""Adam's own defaults, as in torch."""


def wudi(
    deltas: torch.Tensor,
    *,
    solver: Solver = "adam",
    steps: int = 300,
    lr: float = 1e-5,
    others: Rest = "mean",
    optimized: bool = True,
) -> torch.Tensor:
    """Find the matrix that disturbs no task in the directions of its own rows (WUDI).

        merged = argmin_tau sum_i ||(tau - tau_i) tau_i'||^2 / ||tau_i||^2

    The rows of tau_i stand for the inputs of the map, which fine-tuning has moved the rows along.
    The minimum nearest to 0 is ``B A^+``, where ``2 (tau A - B)`` is the gradient:
    ``A = sum_i tau_i' tau_i / ||tau_i||^2`` and ``B = sum_i tau_i tau_i' tau_i / ||tau_i||^2``.

    Source: arXiv 2503.08099. Its authors' code takes the matrices of attention and MLP alone, and
    the base for the rest: ``others="none"``, and ``optimized`` by name pattern.

    Args:
        deltas: shape ``(k, ...)``.
        solver: "adam" takes steps from the sum of the deltas, as the authors do, and stops before
            the minimum; "exact" is the minimum.
        steps: the steps of Adam.
        lr: the learning rate of Adam.
        others: for tensors that aren't matrices, the "mean" of the deltas, their "sum", or "none".
        optimized: optimise the matrix; by name pattern, ``{"*.mlp.*": true, "*": false}`` treats
            some matrices as others are.

    Raises:
        OptionError: if there is no step, or the learning rate isn't above 0.
    """
    _check_steps(steps, lr)
    if deltas.ndim != 3 or not optimized:
        return _merged_plainly(deltas, others)
    if solver == "exact":
        squares, products = _normal_equation(deltas.double())
        return (products @ _inverse(squares)).to(deltas.dtype)
    squares, products = _normal_equation(deltas)

    def gradient(tau: torch.Tensor) -> torch.Tensor:
        return torch.addmm(products, tau, squares, beta=-2, alpha=2)

    return _descend(deltas.sum(0), gradient, steps, lr)


def _check_steps(steps: int, lr: float) -> None:
    if steps < 1 or lr <= 0:
        raise OptionError(f"Adam takes steps, at a rate above 0, not {steps} at {lr:g}")


def _merged_plainly(deltas: torch.Tensor, others: Rest) -> torch.Tensor:
    """Return the mean of deltas, their sum, or zeros."""
    merged = deltas.mean(0) if others == "mean" else deltas.sum(0)
    return torch.zeros_like(merged) if others == "none" else merged


def _normal_equation(deltas: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A and B of ``tau A = B``; a delta that is 0 has no part in them."""
    squares, products = torch.zeros_like(deltas[0].mT @ deltas[0]), torch.zeros_like(deltas[0])
    for delta in deltas:
        norm = delta.square().sum()
        if norm > 0:
            square = delta.mT @ delta / norm
            squares += square
            products += delta @ square
    return squares, products


def _inverse(squares: torch.Tensor) -> torch.Tensor:
    """Return the pseudo-inverse of a symmetric matrix that isn't negative."""
    values, vectors = torch.linalg.eigh(squares)
    least = values[-1] * len(values) * torch.finfo(values.dtype).eps
    inverse = torch.where(values > least, 1 / values, torch.zeros_like(values))
    result: torch.Tensor = (vectors * inverse) @ vectors.mT
    return result


def _descend(
    start: torch.Tensor, gradient: Callable[[torch.Tensor], torch.Tensor], steps: int, lr: float
) -> torch.Tensor:
    """Return what Adam makes of a start, which is overwritten, along a gradient."""
    first, second = torch.zeros_like(start), torch.zeros_like(start)
    for step in range(1, steps + 1):
        slope = gradient(start)
        first.lerp_(slope, 1 - _BETAS[0])
        second.mul_(_BETAS[1]).addcmul_(slope, slope, value=1 - _BETAS[1])
        scale = (second / (1 - _BETAS[1] ** step)).sqrt_().add_(_EPSILON)
        start.addcdiv_(first, scale, value=-lr / (1 - _BETAS[0] ** step))
    return start


@whole(largest=largest_elements)
def doge(
    deltas: torch.Tensor,
    weights: torch.Tensor,
    largest: list[Cutoff],
    *,
    norm: float = 0.07,
    subspace: int = 6,
    steps: int = 400,
    lr: float = 1e-4,
    density: float = 0.3,
    scope: Scope = "global",
    count: Count = "all",
    others: Rest = "mean",
    optimized: bool = True,
) -> torch.Tensor:
    """Shift all deltas outside of the directions that they share, for each task's sake (DOGE).

        l_i = w_i norm / ||tau_i||
        D = argmin_D sum_i sum_rows (tau_i . (tau_i - sum_j l_j (tau_j + D)))^2
        merged = sum_i l_i m_i (tau_i + D)

    where . is the inner product of two rows, and m_i is 1 at the largest elements of tau_i, else 0.
    Adam takes some steps from D = 0, whose gradient loses its part in the shared directions: the
    first ones of the left singular vectors of all deltas together, each with its first r / k.

    Source: arXiv 2501.01230. Its authors' code takes the matrices of attention and MLP alone, also
    for the largest elements, and the base for the rest: ``others="none"``, and ``optimized`` by
    name pattern.

    Args:
        deltas: shape ``(k, ...)``.
        weights: shape ``(k,)``.
        largest: the cutoff of each delta.
        norm: the Frobenius norm that each delta is brought to.
        subspace: of r singular vectors, the first r / subspace are shared.
        steps: the steps of Adam.
        lr: the learning rate of Adam.
        density: the fraction of the elements that is kept.
        scope: "global" keeps this fraction of the model as a whole, and all that equal the smallest
            of them; "tensor" of each tensor.
        count: for scope "global", what the density is a fraction of: "all" elements or the
            "changed" ones.
        others: for tensors that aren't matrices, the "mean" of the deltas, their "sum", or "none".
        optimized: optimise the matrix; by name pattern, ``{"*.mlp.*": true, "*": false}`` treats
            some matrices as others are.

    Raises:
        OptionError: if there is no step or shared direction, or the learning rate isn't above 0.
    """
    _check_steps(steps, lr)
    if subspace < 1:
        raise OptionError(f"subspace is a number to divide by, at least 1, not {subspace}")
    if deltas.ndim != 3 or not optimized or 0 in deltas.shape:
        return _merged_plainly(deltas, others)
    norms = torch.linalg.matrix_norm(deltas)
    scales = torch.where(norms > 0, weights * norm / norms, 0)
    shift = _least_interference(deltas, scales, _shared_directions(deltas, subspace), steps, lr)
    merged = torch.zeros_like(shift)
    for delta, cutoff, scale in zip(deltas, largest, scales, strict=True):
        kept = cutoff.flags(delta.abs().flatten(), 0).view_as(delta)
        merged.addcmul_(kept, delta.add_(shift).mul_(scale))
    return merged


def _shared_directions(deltas: torch.Tensor, subspace: int) -> torch.Tensor:
    """Return the first left singular vectors of those of all deltas, shape ``(rows, count)``."""
    least = min(deltas.shape[1:])
    count = least // subspace
    own = [decompose(delta, max(1, least // len(deltas)))[0] for delta in deltas]
    return decompose(torch.cat(own, dim=1), max(1, count))[0][:, :count].to(deltas.dtype)


def _least_interference(
    deltas: torch.Tensor, scales: torch.Tensor, shared: torch.Tensor, steps: int, lr: float
) -> torch.Tensor:
    """Return the shift of all deltas that Adam finds outside of shared directions."""
    total = float(scales.sum())
    start = torch.einsum("k,kmn->mn", scales, deltas)
    rows = [torch.linalg.vecdot(delta, delta - start) for delta in deltas]

    def gradient(shift: torch.Tensor) -> torch.Tensor:
        slope = torch.zeros_like(shift)
        for delta, row in zip(deltas, rows, strict=True):
            error = row - total * torch.linalg.vecdot(delta, shift)
            slope.addcmul_(delta, error[:, None], value=-2 * total)
        return slope.sub_(shared @ (shared.mT @ slope))

    return _descend(torch.zeros_like(start), gradient, steps, lr)
