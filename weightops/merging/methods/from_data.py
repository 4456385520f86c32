"""Methods that weigh models by what data say of them: Fisher merging and RegMean."""

from __future__ import annotations

from weightops.errors import MethodError, OptionError
from weightops.merging.methods.option_values import fraction
from weightops.support.lazy import torch

_UNEXPLAINED = 1e-6
"""The least share of an input's variance that the inputs before it may leave: float32 sums have no
more digits."""

_CLEAR = 0.03
"""The least such share with which the equations are solved in float32, to about 1e-5 of how far the
models are apart; a ratio of at most 0.97 has no smaller ones."""


def fisher(
    models: torch.Tensor,
    weights: torch.Tensor,
    fishers: torch.Tensor | None,
    fisher_norms: torch.Tensor,
    *,
    normalize: bool = True,
    floor: float = 1e-6,
) -> torch.Tensor:
    """Average the models, each parameter by its Fisher information (Fisher merging).

        merged = sum_i c_i (F_i + floor) theta_i / sum_i c_i (F_i + floor)
        c_i = w_i / (||F_i|| + floor), or w_i

    F_i is the model's Fisher information on its own task; the norm is over all its tensors. Tensors
    without one, such as those of a frozen tower, are averaged by the weights.

    Source: arXiv 2111.09832. Its authors take ``max(F_i, floor)``, and that of the first model
    only; this sum is that of the libraries since.

    Args:
        models: shape ``(k, ...)``.
        weights: shape ``(k,)``.
        fishers: the diagonal Fisher information, of the models' shape; or None.
        fisher_norms: its norm over all tensors, shape ``(k,)``.
        normalize: divide by the norm, so that no model counts more for its larger gradients.
        floor: the least information, which parameters that no data use are averaged by.

    Raises:
        OptionError: if floor is negative, or the weights sum to 0 where there is no information.
        MethodError: where the shares of the models sum to 0.
    """
    if floor < 0:
        raise OptionError(f"floor is at least 0, not {floor}")
    if fishers is None:
        return _average(models, weights)
    shares = weights / (fisher_norms + floor) if normalize else weights
    total, moved = torch.zeros_like(models[0]), torch.zeros_like(models[0])
    for model, information, share in zip(models, fishers, shares, strict=True):
        own = (information + floor).mul_(share)
        total += own
        moved.addcmul_(own, model - models[0])
    if bool((total == 0).any()):
        raise MethodError("the shares of the models sum to 0", hint="raise floor, or the weights")
    return moved.div_(total).add_(models[0])


def regmean(
    models: torch.Tensor, weights: torch.Tensor, grams: torch.Tensor | None, *, ratio: float = 0.9
) -> torch.Tensor:
    """Merge each linear map so that its outputs are nearest to those of all models (RegMean).

        merged = (sum_i w_i W_i G_i) (sum_i w_i G_i)^-1
        G_i = the mean of x x' over the inputs x of W_i, its off-diagonal times ``ratio``

    This is the minimum of ``sum_i w_i mean_x |merged x - W_i x|^2`` for ratio 1. Inputs that are
    always 0, and tensors that aren't linear maps, are averaged by the weights. Convolutions,
    projections and heads are linear maps, too; the authors' code merges layers of torch's class
    Linear so, and averages the rest.

    Source: dataless knowledge fusion, arXiv 2212.09849. With Gram matrices that are taken layer by
    layer, at the inputs that the merged layers give, it is RegMean++ (arXiv 2508.03121); a recipe
    has them made by ``statistics: {gram: {task: ..., after: merged}}``.

    Args:
        models: the weights of a linear map, shape ``(k, out, in)``; or ``(k, ...)``.
        weights: shape ``(k,)``.
        grams: the Gram matrices, shape ``(k, in, in)``; or None.
        ratio: the factor of the off-diagonal; with less than 1, the sum of the Gram matrices can be
            inverted after few images, too. The authors take 0.9, and 0.1 for T5; those of RegMean++
            take 0.95 for CLIP, where all after the blocks stays as in the base.

    Raises:
        OptionError: if the weights sum to 0.
        MethodError: if the sum of the Gram matrices is singular.
    """
    fraction(ratio, "ratio")
    mean = _average(models, weights)
    if grams is None:
        return mean
    shares = [float(share) for share in weights / weights.sum()]
    total, right, first = torch.zeros_like(grams[0]), torch.zeros_like(mean), models[0]
    for i, (model, gram, share) in enumerate(zip(models, grams, shares, strict=True)):
        total.add_(gram, alpha=share)
        if i:
            delta = model - first
            right.addmm_(delta, gram, alpha=share * ratio)
            right.addcmul_(delta, gram.diagonal(), value=share * (1 - ratio))
    variances = total.diagonal().clone()
    unused = variances == 0
    total.mul_(ratio).diagonal().copy_(torch.where(unused, 1, variances))
    factor, left = _decompose(total)
    if left < _UNEXPLAINED and bool((weights < 0).any()):
        raise MethodError(
            "the weighted sum of the Gram matrices isn't positive, as some weights are negative",
            hint="give weights above 0",
        )
    if left < _UNEXPLAINED:
        raise MethodError(
            "the sum of the Gram matrices is singular: its inputs are too few, or depend on each "
            "other",
            hint="collect from more images, or set ratio= below 1, such as 0.9",
        )
    moved = torch.cholesky_solve(right.mT.to(factor.dtype), factor).mT
    return torch.where(unused, mean, first + moved.to(models.dtype))


def _decompose(total: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Return the Cholesky factor of a sum of Gram matrices, and the least share of a variance.

    It is the share that the inputs before an input leave of its variance; 0 if there is no factor.
    Where it is small, the factor is in float64.
    """
    for dtype in (total.dtype, torch.float64):
        matrix = total.to(dtype)
        factor, failed = torch.linalg.cholesky_ex(matrix)
        left = 0.0 if failed else float((factor.diagonal().square() / matrix.diagonal()).min())
        if left > _CLEAR:
            break
    return factor, left


def _average(models: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return the average of models, shape ``(k, ...)``, by their weights.

    Raises:
        OptionError: if the weights sum to 0.
    """
    if weights.sum() == 0:
        raise OptionError("the weights of an average must not sum to 0")
    shares = weights / weights.sum()
    moved: torch.Tensor = models[0] + torch.tensordot(shares, models - models[0], dims=1)
    return moved
