"""Methods that find the task vector which disturbs the tasks least: WUDI."""

from __future__ import annotations

from typing import Literal

from weightops.errors import OptionError
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
    if steps < 1 or lr <= 0:
        raise OptionError(f"wudi takes steps, at a rate above 0, not {steps} at {lr:g}")
    if deltas.ndim != 3 or not optimized:
        mean = deltas.mean(0) if others == "mean" else deltas.sum(0)
        return torch.zeros_like(mean) if others == "none" else mean
    if solver == "exact":
        squares, products = _normal_equation(deltas.double())
        return (products @ _inverse(squares)).to(deltas.dtype)
    return _descend(deltas.sum(0), *_normal_equation(deltas), steps, lr)


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
    start: torch.Tensor, squares: torch.Tensor, products: torch.Tensor, steps: int, lr: float
) -> torch.Tensor:
    """Return what Adam makes of a start on the gradient ``2 (tau A - B)``."""
    first, second = torch.zeros_like(start), torch.zeros_like(start)
    for step in range(1, steps + 1):
        gradient = torch.addmm(products, start, squares, beta=-2, alpha=2)
        first.lerp_(gradient, 1 - _BETAS[0])
        second.mul_(_BETAS[1]).addcmul_(gradient, gradient, value=1 - _BETAS[1])
        scale = (second / (1 - _BETAS[1] ** step)).sqrt_().add_(_EPSILON)
        start.addcdiv_(first, scale, value=-lr / (1 - _BETAS[0] ** step))
    return start
