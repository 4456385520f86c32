"""Methods whose result is a linear combination of the inputs: each gives the coefficients.

Where these depend on the tensors, it is through their inner products alone.
"""

from __future__ import annotations

import torch

from weightops.errors import OptionError
from weightops.merging.methods.method import combination


@combination("weights")
def linear(weights: torch.Tensor, *, normalize: bool = True) -> torch.Tensor:
    r"""Weighted average :math:`\sum_i w_i \theta_i / \sum_i w_i`; with equal weights the uniform soup (arXiv 2203.05482).

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
def task_arithmetic(weights: torch.Tensor) -> torch.Tensor:
    r"""The sum of task vectors :math:`\sum_i w_i \tau_i` (arXiv 2212.04089).

    Args:
        weights: shape ``(k,)``.
    """
    return weights


@combination("weights")
def ema(weights: torch.Tensor, *, decay: float = 0.9) -> torch.Tensor:
    r"""Exponential moving average over a run's checkpoints, the oldest first: :math:`\mu \leftarrow d\,\mu + (1 - d)\,\theta_i`.

    Args:
        weights: shape ``(k,)``; only their number counts.
        decay: :math:`d`, from 0 (the last) to 1 (the first).
    """
    ages = torch.arange(len(weights) - 1, -1, -1, dtype=weights.dtype)
    coefficients = (1 - decay) * decay**ages
    coefficients[0] = decay ** (len(weights) - 1)
    return coefficients


@combination("weights")
def passthrough(weights: torch.Tensor, *, index: int = 0, scale: float = 1.0) -> torch.Tensor:
    """One of the models as it is, or multiplied by a number.

    Args:
        weights: shape ``(k,)``; only their number counts.
        index: which.
        scale: what to multiply it by.

    Raises:
        OptionError: if there is no such model.
    """
    if not -len(weights) <= index < len(weights):
        raise OptionError(f"there is no model {index} among {len(weights)}")
    chosen = torch.zeros_like(weights)
    chosen[index] = scale
    return chosen


@combination("delta")
def model_stock(gram: torch.Tensor) -> torch.Tensor:
    r"""Model Stock: :math:`t\,\bar\tau` with :math:`t = k\cos\theta / (1 + (k - 1)\cos\theta)` (arXiv 2403.19522).

    :math:`\cos\theta` is the mean cosine of two deltas of the tensor. Where the denominator is 0, :math:`t` is 0.

    Args:
        gram: inner products of the deltas, shape ``(k, k)``, at least two.

    Raises:
        OptionError: for fewer than two.
    """
    k = len(gram)
    if k < 2:
        raise OptionError("model_stock needs at least two models beside the base")
    norms = gram.diagonal().sqrt()
    cosines = gram / (norms[:, None] * norms).clamp(min=torch.finfo(gram.dtype).tiny)
    cosine = float((cosines.sum() - cosines.diagonal().sum()) / (k * (k - 1)))
    denominator = 1 + (k - 1) * cosine
    ratio = 0.0 if abs(denominator) <= 1e-6 else k * cosine / denominator
    return torch.full((k,), ratio / k, dtype=gram.dtype)
