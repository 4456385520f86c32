"""Merging along great circles: SLERP, NuSLERP and the Karcher mean."""

from __future__ import annotations

import torch

from weightops.errors import OptionError
from weightops.methods.averaging import weighted_sum

_PARALLEL = 1e-6  # a sine this small: the arc is a line


def _arc(start: torch.Tensor, end: torch.Tensor, t: float | torch.Tensor) -> torch.Tensor:
    """From ``start`` to ``end`` (flat) along the great circle of their directions, on the straight line where there is none."""
    norms = start.norm() * end.norm()
    cosine = (start @ end / norms).clamp(-1, 1) if norms > 0 else start.new_tensor(1.0)
    angle = torch.arccos(cosine)
    sine = torch.sin(angle)
    if sine < _PARALLEL:
        return torch.lerp(start, end, t)
    return (torch.sin((1 - t) * angle) * start + torch.sin(t * angle) * end) / sine


def slerp(models: torch.Tensor, *, t: float = 0.5) -> torch.Tensor:
    r"""Spherical interpolation of two models: :math:`\frac{\sin((1-t)\theta)}{\sin\theta} x + \frac{\sin(t\theta)}{\sin\theta} y`.

    :math:`\theta` is the angle between the two tensors; where they are parallel it is linear (Shoemake, 1985).

    Args:
        models: shape ``(2, ...)``.
        t: 0 gives the first, 1 the second.

    Raises:
        OptionError: for other than two models.
    """
    if len(models) != 2:
        raise OptionError(
            f"slerp goes from one model to another; there are {len(models)}: nuslerp and karcher take more"
        )
    if t in (0, 1):
        return models[int(t)].clone()
    return _arc(models[0].reshape(-1), models[1].reshape(-1), t).reshape(models[0].shape)


def nuslerp(models: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    r"""SLERP by weights, one model after another: the next is taken in by its share of the weights so far.

    Args:
        models: shape ``(k, ...)``.
        weights: shape ``(k,)``; for two it is `slerp` at :math:`w_2 / (w_1 + w_2)`.
    """
    merged, total = models[0].reshape(-1), weights[0]
    for model, weight in zip(models[1:], weights[1:], strict=True):
        total = total + weight
        merged = _arc(merged, model.reshape(-1), weight / total if total != 0 else weight.new_tensor(0.5))
    return merged.reshape(models[0].shape)


def karcher(models: torch.Tensor, weights: torch.Tensor, *, steps: int = 50, tolerance: float = 1e-6) -> torch.Tensor:
    r"""The Karcher mean: the point of the sphere from which the models' directions, as arcs, sum to zero; with their mean norm.

    Iterates :math:`\mu \leftarrow \exp_\mu \sum_i w_i \log_\mu x_i` (Karcher, 1977).

    Args:
        models: shape ``(k, ...)``.
        weights: shape ``(k,)``; normalised.
        steps: at most so many.
        tolerance: stop when a step is shorter than this angle.
    """
    shares = weights / weights.sum()
    rows = models.reshape(len(models), -1)
    norms = rows.norm(dim=1)
    if not bool((norms > 0).all()) or rows.shape[1] < 2:
        return weighted_sum(models, shares)
    units = rows / norms[:, None]
    mean = shares @ units
    if mean.norm() < _PARALLEL:
        return weighted_sum(models, shares)
    mean = mean / mean.norm()
    for _ in range(steps):
        cosines = (units @ mean).clamp(-1, 1)
        angles = torch.arccos(cosines)
        sines = torch.sin(angles)
        scale = torch.where(sines > _PARALLEL, angles / sines.clamp(min=_PARALLEL), 1.0)
        tangent = (shares * scale) @ (units - cosines[:, None] * mean)
        length = tangent.norm()
        if length < tolerance:
            break
        mean = torch.cos(length) * mean + torch.sin(length) * tangent / length
        mean = mean / mean.norm()
    merged: torch.Tensor = mean * (shares @ norms)
    return merged.reshape(models[0].shape)
