"""Merging along great circles: SLERP, NuSLERP and the Karcher mean. All lie in the span of the inputs."""

from __future__ import annotations

import math

import torch

from weightops.errors import OptionError
from weightops.merging.methods.method import combination

_PARALLEL = 1e-6  # a sine this small: the arc is a line


def _arc(gram: torch.Tensor, start: torch.Tensor, end: torch.Tensor, t: float) -> torch.Tensor:
    """From ``start`` to ``end`` (coefficients) along the great circle of their directions, on the straight line where there is none."""
    norms = math.sqrt(float(start @ gram @ start) * float(end @ gram @ end))
    cosine = min(max(float(start @ gram @ end) / norms, -1.0), 1.0) if norms > 0 else 1.0
    angle = math.acos(cosine)
    sine = math.sin(angle)
    if sine < _PARALLEL:
        return (1 - t) * start + t * end
    return (math.sin((1 - t) * angle) * start + math.sin(t * angle) * end) / sine


@combination("weights")
def slerp(gram: torch.Tensor, *, t: float = 0.5, parallel: float = 1.0) -> torch.Tensor:
    r"""Spherical interpolation of two models: :math:`\frac{\sin((1-t)\theta)}{\sin\theta} x + \frac{\sin(t\theta)}{\sin\theta} y`.

    :math:`\theta` is the angle between the two tensors; where they are parallel it is linear (Shoemake, 1985).

    Args:
        gram: inner products of the two, shape ``(2, 2)``.
        t: 0 gives the first, 1 the second.
        parallel: tensors whose cosine is more than this are interpolated linearly.

    Raises:
        OptionError: for other than two models.
    """
    if len(gram) != 2:
        raise OptionError(
            f"slerp goes from one model to another; there are {len(gram)}: nuslerp and karcher take more"
        )
    first, second = torch.eye(2, dtype=gram.dtype)
    norms = math.sqrt(float(gram[0, 0] * gram[1, 1]))
    if abs(float(gram[0, 1])) > parallel * norms:
        return torch.lerp(first, second, t)
    return _arc(gram, first, second, t)


@combination("weights")
def nuslerp(gram: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    r"""SLERP by weights, one model after another: the next is taken in by its share of the weights so far.

    Args:
        gram: inner products of the models, shape ``(k, k)``.
        weights: shape ``(k,)``; for two it is `slerp` at :math:`w_2 / (w_1 + w_2)`.
    """
    models = torch.eye(len(gram), dtype=gram.dtype)
    merged, total = models[0], float(weights[0])
    for model, weight in zip(models[1:], weights[1:].tolist(), strict=True):
        total += weight
        merged = _arc(gram, merged, model, weight / total if total != 0 else 0.5)
    return merged


@combination("weights")
def karcher(
    gram: torch.Tensor, weights: torch.Tensor, *, steps: int = 50, tolerance: float = 1e-6
) -> torch.Tensor:
    r"""The Karcher mean: the point of the sphere from which the models' directions, as arcs, sum to zero; with their mean norm.

    Iterates :math:`\mu \leftarrow \exp_\mu \sum_i w_i \log_\mu x_i` (Karcher, 1977).

    Args:
        gram: inner products of the models, shape ``(k, k)``.
        weights: shape ``(k,)``; normalised.
        steps: at most so many.
        tolerance: stop when a step is shorter than this angle.
    """
    shares = weights / weights.sum()
    norms = gram.diagonal().sqrt()
    if not bool((norms > 0).all()):
        return shares
    cosines = gram / (norms[:, None] * norms)
    mean = shares
    for _ in range(steps + 1):
        length = math.sqrt(max(float(mean @ cosines @ mean), 0.0))
        if length < _PARALLEL:
            return shares  # directions that cancel have no mean
        mean = mean / length
        towards = (cosines @ mean).clamp(-1, 1)
        angles = torch.arccos(towards)
        sines = torch.sin(angles)
        scale = shares * torch.where(sines > _PARALLEL, angles / sines.clamp(min=_PARALLEL), 1.0)
        tangent = scale - (scale @ towards) * mean
        length = math.sqrt(max(float(tangent @ cosines @ tangent), 0.0))
        if length < tolerance:
            break
        mean = math.cos(length) * mean + math.sin(length) / length * tangent
    return mean * (shares @ norms) / norms
