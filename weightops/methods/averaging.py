"""Methods whose result is a mean: linear, task arithmetic, Model Stock, EMA, passthrough."""

from __future__ import annotations

import torch

from weightops.errors import OptionError


def weighted_sum(tensors: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Sum over the first dimension of ``(k, ...)``, with weights of shape ``(k,)``."""
    return (weights @ tensors.reshape(len(tensors), -1)).reshape(tensors.shape[1:])


def linear(models: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    r"""Weighted average :math:`\sum_i w_i \theta_i / \sum_i w_i`; with equal weights the uniform soup (arXiv 2203.05482).

    Args:
        models: shape ``(k, ...)``.
        weights: shape ``(k,)``.

    Raises:
        OptionError: if the weights sum to 0.
    """
    total = weights.sum()
    if total == 0:
        raise OptionError("the weights of an average must not sum to 0")
    return models[0] + weighted_sum(models - models[0], weights / total)


def task_arithmetic(deltas: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    r"""The sum of task vectors :math:`\sum_i w_i \tau_i` (arXiv 2212.04089).

    Args:
        deltas: shape ``(k, ...)``.
        weights: shape ``(k,)``.
    """
    return weighted_sum(deltas, weights)


def ema(models: torch.Tensor, *, decay: float = 0.9) -> torch.Tensor:
    r"""Exponential moving average over a run's checkpoints, the oldest first: :math:`\mu \leftarrow d\,\mu + (1 - d)\,\theta_i`.

    Args:
        models: shape ``(k, ...)``.
        decay: :math:`d`, from 0 (the last) to 1 (the first).
    """
    mean = models[0].clone()
    for model in models[1:]:
        mean = mean + (1 - decay) * (model - mean) if decay else model.clone()
    return mean


def passthrough(models: torch.Tensor, *, index: int = 0) -> torch.Tensor:
    """One of the models as it is.

    Args:
        models: shape ``(k, ...)``.
        index: which.

    Raises:
        OptionError: if there is no such model.
    """
    if not -len(models) <= index < len(models):
        raise OptionError(f"there is no model {index} among {len(models)}")
    return models[index].clone()


def model_stock(deltas: torch.Tensor) -> torch.Tensor:
    r"""Model Stock: :math:`t\,\bar\tau` with :math:`t = k\cos\theta / (1 + (k - 1)\cos\theta)` (arXiv 2403.19522).

    :math:`\cos\theta` is the mean cosine of two deltas of the tensor. A negative :math:`t` is taken as 0.

    Args:
        deltas: shape ``(k, ...)``, at least two.

    Raises:
        OptionError: for fewer than two.
    """
    k = len(deltas)
    if k < 2:
        raise OptionError("model_stock needs at least two models beside the base")
    rows = torch.nn.functional.normalize(deltas.reshape(k, -1), dim=1)
    cosines = rows @ rows.T
    cosine = (cosines.sum() - cosines.diagonal().sum()) / (k * (k - 1))
    ratio = (k * cosine / (1 + (k - 1) * cosine)).clamp(min=0) if 1 + (k - 1) * cosine > 0 else cosine.new_tensor(0.0)
    return deltas.mean(0) * ratio
