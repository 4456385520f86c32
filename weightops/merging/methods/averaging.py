"""Methods whose result is a linear combination of the inputs: each returns the coefficients.

Where the coefficients depend on the tensors, it is through their inner products alone.
"""

from __future__ import annotations

from functools import reduce
from operator import add

from weightops.errors import OptionError
from weightops.merging.methods.consensus import Divisor, divisor
from weightops.merging.methods.method import combination, fixed_combination
from weightops.support.lazy import torch


@fixed_combination("weights")
def linear(weights: list[float], *, normalize: bool = True) -> list[float]:
    """Average the models by weights; equal weights give the uniform soup.

        merged = sum_i w_i theta_i / sum_i w_i

    Source: model soups, arXiv 2203.05482.

    Args:
        weights: k numbers.
        normalize: divide by the sum of the weights.

    Raises:
        OptionError: if the weights sum to 0.
    """
    if not normalize:
        return weights
    total = reduce(add, weights)
    if total == 0:
        raise OptionError("the weights of an average must not sum to 0")
    return [weight / total for weight in weights]


@fixed_combination("delta")
def task_arithmetic(weights: list[float], *, normalize: Divisor = "none") -> list[float]:
    """Add the task vectors.

        merged = sum_i w_i tau_i / n

    Source: task arithmetic, arXiv 2212.04089.

    Args:
        weights: k numbers.
        normalize: the divisor n: "none" is 1, "weights" is sum_i w_i where that isn't 0.
    """
    number = divisor(reduce(add, weights), normalize)
    return [weight / number for weight in weights]


@fixed_combination("weights")
def ema(weights: list[float], *, decay: float = 0.9) -> list[float]:
    """Take the exponential moving average over the checkpoints of a run, from the oldest on.

        mu_1 = theta_1
        mu_i = decay mu_(i-1) + (1 - decay) theta_i

    Args:
        weights: k numbers; their values don't matter.
        decay: from 0, which gives the last checkpoint, to 1, which gives the first.
    """
    oldest = len(weights) - 1
    return [decay**oldest, *((1 - decay) * decay**age for age in reversed(range(oldest)))]


@fixed_combination("weights")
def passthrough(weights: list[float], *, index: int = 0, scale: float = 1.0) -> list[float]:
    """Take one of the models, multiplied by a number.

        merged = scale theta_index

    Args:
        weights: k numbers; their values don't matter.
        index: the position of the model; negative ones count from the last.
        scale: the factor.

    Raises:
        OptionError: if there is no such model.
    """
    if not -len(weights) <= index < len(weights):
        raise OptionError(f"there is no model {index} among {len(weights)}")
    chosen = [0.0] * len(weights)
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
