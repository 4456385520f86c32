"""Methods along great circles: SLERP, NuSLERP, Karcher mean. Results are in the inputs' span."""

from __future__ import annotations

import math

from weightops.errors import OptionError
from weightops.merging.methods.method import combination
from weightops.support.lazy import torch

_PARALLEL = 1e-6
"""The sine of an angle up to which an arc is treated as a straight line."""


def _arc(gram: torch.Tensor, start: torch.Tensor, end: torch.Tensor, t: float) -> torch.Tensor:
    """Return the coefficients of a point on the great circle between two combinations.

    Where their directions are parallel, the point is on the straight line.

    Args:
        gram: the inner products of the models, shape ``(k, k)``.
        start: the coefficients at ``t = 0``, shape ``(k,)``.
        end: the coefficients at ``t = 1``, shape ``(k,)``.
        t: the share of the angle.
    """
    norms = math.sqrt(float(start @ gram @ start) * float(end @ gram @ end))
    cosine = min(max(float(start @ gram @ end) / norms, -1.0), 1.0) if norms > 0 else 1.0
    angle = math.acos(cosine)
    sine = math.sin(angle)
    if sine < _PARALLEL:
        return (1 - t) * start + t * end
    return (math.sin((1 - t) * angle) * start + math.sin(t * angle) * end) / sine


@combination("weights")
def slerp(gram: torch.Tensor, *, t: float = 0.5, parallel: float = 1.0) -> torch.Tensor:
    """Interpolate two models along the great circle of their directions (SLERP).

        merged = (sin((1 - t) angle) theta_1 + sin(t angle) theta_2) / sin(angle)

    The angle is that between the two tensors. Parallel tensors are interpolated linearly.

    Source: Shoemake, 1985.

    Args:
        gram: the inner products of the models, shape ``(2, 2)``.
        t: the share of the angle: 0 gives the first model, 1 the second.
        parallel: the cosine above which tensors count as parallel.

    Raises:
        OptionError: for other than two models.
    """
    if len(gram) != 2:
        raise OptionError(
            f"slerp goes from one model to another, and there are {len(gram)}",
            hint="nuslerp and karcher take any number of models",
        )
    first, second = torch.eye(2, dtype=gram.dtype)
    norms = math.sqrt(float(gram[0, 0] * gram[1, 1]))
    if abs(float(gram[0, 1])) > parallel * norms:
        return torch.lerp(first, second, t)
    return _arc(gram, first, second, t)


@combination("weights")
def nuslerp(gram: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Interpolate models along great circles by weights, one after another (NuSLERP).

        mu_1 = theta_1
        mu_i = slerp(mu_(i-1), theta_i) at t = w_i / (w_1 + ... + w_i)

    Source: Shoemake, 1985, for two models.

    Args:
        gram: the inner products of the models, shape ``(k, k)``.
        weights: shape ``(k,)``.
    """
    models = torch.eye(len(gram), dtype=gram.dtype)
    merged, total = models[0], float(weights[0])
    for model, weight in zip(models[1:], weights[1:].tolist(), strict=True):
        total += weight
        merged = _arc(gram, merged, model, weight / total if total != 0 else 0.5)
    return merged


@combination("weights")
def multislerp(
    gram: torch.Tensor, weights: torch.Tensor, *, normalize: bool = True, epsilon: float = 1e-8
) -> torch.Tensor:
    """Average the models' directions, and go out to their mean norm (Multi-SLERP).

        u = sum_i w_i theta_i / (||theta_i|| + epsilon)
        merged = u / ||u|| sum_i w_i ||theta_i||

    It is the barycentre in the tangent space at u, where the tangents' weighted sum is 0. Two
    models whose directions cancel are averaged linearly. A model alone is itself.

    Source: Goddard, 2025, https://goddard.blog/posts/multislerp-wow-what-a-cool-idea

    Args:
        gram: the inner products of the models, shape ``(k, k)``.
        weights: shape ``(k,)``.
        normalize: divide the weights by their sum.
        epsilon: what is added to norms before directions are taken.

    Raises:
        OptionError: if the weights sum to 0, or the directions of more than two models cancel, or
            are all shorter than epsilon.
    """
    if len(weights) == 1:
        return torch.ones_like(weights)
    if normalize:
        if weights.sum() == 0:
            raise OptionError("the weights of multislerp must not sum to 0")
        weights = weights / weights.sum()
    norms = gram.diagonal().sqrt()
    if not bool((norms > 0).any()):
        return weights
    directions = weights / (norms + epsilon)
    length = math.sqrt(max(float(directions @ gram @ directions), 0.0))
    if length < epsilon:
        if len(weights) == 2:
            return weights
        raise OptionError(
            f"the weighted directions of multislerp sum to {length:.1e}, less than epsilon",
            hint="choose other weights, or a smaller epsilon",
        )
    return directions / length * (weights @ norms)


@combination("weights")
def karcher(
    gram: torch.Tensor, weights: torch.Tensor, *, steps: int = 50, tolerance: float = 1e-6
) -> torch.Tensor:
    """Average the models' directions on the sphere, at their mean norm (Karcher mean).

        mu <- exp_mu(sum_i w_i log_mu(theta_i / ||theta_i||)), until mu stays where it is
        merged = mu sum_i w_i ||theta_i||

    Source: Karcher, 1977.

    Args:
        gram: the inner products of the models, shape ``(k, k)``.
        weights: shape ``(k,)``; they are normalised.
        steps: the largest number of iterations.
        tolerance: the angle of an iteration, in radians, at which to stop.
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
