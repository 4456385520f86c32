"""The combination of sparsified deltas that TIES, DARE, DELLA, Breadcrumbs and SCE share.

With sparsified deltas d_i and weights w_i, element by element::

    sign = sgn(sum_i w_i d_i), where sgn(0) = 1
    agree_i = 1 where w_i d_i sign > 0, else 0
    merged = sum_i agree_i w_i d_i / n

where n is ``sum_i agree_i w_i`` ("weights"), ``sum_i agree_i`` ("count") or 1 ("none"); and 1 where
it would be 0. Without an election of signs, all deltas agree.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from weightops.algebra.kernels import add_rows
from weightops.engine.reduce import sums
from weightops.merging.methods.inputs import Chunk, TensorInputs
from weightops.support.lazy import torch

Normalize = Literal["weights", "count", "none"]
Divisor = Literal["weights", "none"]
"""The divisor where all deltas agree: the sum of the weights, where that isn't 0, or 1."""


def divisor(total: float, normalize: Divisor) -> float:
    """Return the number that deltas are divided by whose weights have a sum."""
    return total if normalize == "weights" and abs(total) >= _NO_SUM else 1.0


_NO_SUM = 1e-8
"""The magnitude below which weights count as of sum 0, as in mergekit."""


def consensus(
    deltas: torch.Tensor,
    weights: torch.Tensor,
    *,
    elect: bool,
    normalize: Normalize,
    scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Combine sparsified deltas, which are overwritten.

    Args:
        deltas: shape ``(k, ...)``.
        weights: shape ``(k,)``.
        elect: let only those elements count that agree with the elected sign.
        normalize: the divisor of elected elements; without an election, "weights" or "none".
        scale: factors that the deltas are multiplied by before, shape ``(k,)``.
    """
    multiply_(deltas, weights if scale is None else weights * scale)
    if not elect:
        number = divisor(float(weights.sum()), "weights" if normalize == "weights" else "none")
        total = add_rows(deltas)
        return total if number == 1 else total.div_(number)
    sign = elect_(deltas)
    total = add_rows(deltas).mul_(sign)
    if normalize == "none":
        return total
    agree = flags(torch.gt, deltas, 0, out=deltas)
    return divide_(total, multiply_(agree, weights) if normalize == "weights" else agree)


def restoring_scale(
    inputs: TensorInputs, sparsify: Callable[[Chunk], torch.Tensor]
) -> torch.Tensor:
    """Return the factors that restore each input's sum of magnitudes, shape ``(k,)``.

    The factor is 1 where nothing is left.
    """
    before, after = torch.zeros(2, inputs.k, dtype=torch.float64)
    for chunk in inputs:
        before += sums(chunk.values.flatten(1).abs())
        after += sums(sparsify(chunk).flatten(1).abs_())
    return torch.where(after > 0, before / after, 1.0).to(inputs.device, inputs.dtype)


def multiply_(values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Multiply values of shape ``(k, ...)`` by weights of shape ``(k,)``, in place."""
    if bool((weights == 1).all()):
        return values
    return values.mul_(weights.view(-1, *[1] * (values.ndim - 1)))


def elect_(deltas: torch.Tensor) -> torch.Tensor:
    """Return the sign of the deltas' sum.

    The deltas become the magnitudes of the elements that agree with it, and 0 elsewhere.
    """
    sign = flags(torch.ge, add_rows(deltas), 0).mul_(2).sub_(1)
    deltas.mul_(sign).relu_()
    return sign


def divide_(total: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """Divide a total in place by the sum of shares of shape ``(k, ...)``, where that isn't 0."""
    divisor = add_rows(shares)
    return total.div_(divisor.add_(flags(torch.eq, divisor, 0)))


def flags(
    test: Callable[..., Any], values: torch.Tensor, other: float, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Return 1 where a test of values holds and 0 elsewhere.

    The flags have the dtype of the values, with which arithmetic is far faster than with booleans.
    """
    result: torch.Tensor = test(values, other, out=torch.empty_like(values) if out is None else out)
    return result
