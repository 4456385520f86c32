"""Methods whose result is a linear combination of the inputs: each returns the coefficients.

Where the coefficients depend on the tensors, it is through their inner products alone.
"""

from __future__ import annotations

import torch

from weightops.errors import OptionError
from weightops.merging.methods.consensus import Divisor, divisor
from weightops.merging.methods.method import combination


@combination("weights")
def linear(weights: torch.Tensor, *, normalize: bool = True) -> torch.Tensor:
    """Average the models by weights; equal weights give the uniform soup.

        merged = sum_i w_i theta_i / sum_i w_i

    Source: model soups, arXiv 2203.05482.

    Args:
        weights: shape ``(k,)``.
        normalize: divide by the sum of the weights.

    Raises:
        OptionError: if the weights sum to 0.
    """
    if not normalize:
        return weights
    total = weights.sum()
    if total == 0:
        raise OptionError("the weights of an average must not sum to 0")
    return weights / total


@combination("delta")
def task_arithmetic(weights: torch.Tensor, *, normalize: Divisor = "none") -> torch.Tensor:
    """Add the task vectors.

        merged = sum_i w_i tau_i / n

    Source: task arithmetic, arXiv 2212.04089.

    Args:
        weights: shape ``(k,)``.
        normalize: the divisor n: "none" is 1, "weights" is sum_i w_i where that isn't 0.
    """
    return weights / divisor(weights, normalize)


@combination("weights")
def ema(weights: torch.Tensor, *, decay: float = 0.9) -> torch.Tensor:
    """Take the exponential moving average over the checkpoints of a run, from the oldest on.

        mu_1 = theta_1
        mu_i = decay mu_(i-1) + (1 - decay) theta_i

    Args:
        weights: shape ``(k,)``; their values don't matter.
        decay: from 0, which gives the last checkpoint, to 1, which gives the first.
    """
    ages = torch.arange(len(weights) - 1, -1, -1, dtype=weights.dtype)
    coefficients = (1 - decay) * decay**ages
    coefficients[0] = decay ** (len(weights) - 1)
    return coefficients


@combination("weights")
def passthrough(weights: torch.Tensor, *, index: int = 0, scale: float = 1.0) -> torch.Tensor:
    """Take one of the models, multiplied by a number.

        merged = scale theta_index

    Args:
        weights: shape ``(k,)``; their values don't matter.
        index: the position of the model; negative ones count from the last.
        scale: the factor.

    Raises:
        OptionError: if there is no such model.
    """
    if not -len(weights) <= index < len(weights):
        raise OptionError(f"there is no model {index} among {len(weights)}")
    chosen = torch.zeros_like(weights)
    chosen[index] = scale
    return chosen


@combination("delta")
def model_stock(gram: torch.Tensor, *, cosine_floor: float = 0.0) -> torch.Tensor:
    """Shrink the mean of the deltas by the angle between them (Model Stock).

        merged = t mean_i tau_i
        t = k cos / (1 + (k - 1) cos)

    cos is the mean cosine of two deltas of the tensor. Where the denominator is 0, t is 0.

    Source: arXiv 2403.19522.

    Args:
        gram: the inner products of the deltas, shape ``(k, k)``.
        cosine_floor: the least product of two norms that a cosine is divided by. mergekit has
            1e-6, so that small updates count as orthogonal.

    Raises:
        OptionError: for fewer than two models.
    """
    k = len(gram)
    if k < 2:
        raise OptionError("model_stock needs at least two models beside the base")
    return stock_ratio(gram, cosine_floor).expand(k) / k


def stock_ratio(gram: torch.Tensor, cosine_floor: float) -> torch.Tensor:
    """Return Model Stock's ratio t, shape ``(...)``, from inner products, ``(..., k, k)``."""
    k = gram.shape[-1]
    norms = gram.diagonal(dim1=-2, dim2=-1).sqrt()
    floor = max(cosine_floor, torch.finfo(gram.dtype).tiny)
    cosines = gram / (norms[..., :, None] * norms[..., None, :]).clamp(min=floor)
    own = cosines.diagonal(dim1=-2, dim2=-1).sum(-1)
    cosine = (cosines.sum((-2, -1)) - own) / (k * (k - 1))
    denominator = 1 + (k - 1) * cosine
    singular = denominator.abs() <= 1e-6
    return torch.where(singular, 0.0, k * cosine / denominator.where(~singular, 1.0))
