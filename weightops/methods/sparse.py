r"""Sparsify, elect a sign, combine: TIES, DARE, Breadcrumbs, DELLA, magnitude trimming and SCE.

One definition, of which each method is a choice of parts. With sparsified deltas :math:`\hat\tau_i` and weights
:math:`w_i`, the elected sign is :math:`\gamma = \mathrm{sgn} \sum_i w_i \hat\tau_i`, those that agree are
:math:`a_i = [\hat\tau_i \gamma > 0]`, and the result is :math:`\sum_i a_i w_i \hat\tau_i / n` with
:math:`n = \sum_i a_i w_i` ("weights"), :math:`\sum_i a_i` ("count") or 1 ("none").
"""

from __future__ import annotations

from typing import Literal

import torch

from weightops.methods.method import Draws
from weightops.methods.select import count, fraction, largest

Normalize = Literal["weights", "count", "none"]
Rescale = Literal["expectation", "l1", "none"]


def consensus(deltas: torch.Tensor, weights: torch.Tensor, *, elect: bool, normalize: Normalize) -> torch.Tensor:
    """Combine sparsified deltas of shape ``(k, ...)``; without an election all agree."""
    shaped = weights.view(-1, *[1] * (deltas.ndim - 1))
    weighted = deltas * shaped
    agree = torch.ones_like(deltas, dtype=torch.bool)
    if elect:
        agree = weighted * torch.sign(weighted.sum(0)) > 0
        weighted = torch.where(agree, weighted, 0)
    total = weighted.sum(0)
    if normalize == "none":
        return total
    divisor = (agree * shaped).sum(0) if normalize == "weights" else agree.sum(0).to(total.dtype)
    return torch.where(divisor.abs() > 1e-8, total / torch.where(divisor == 0, 1, divisor), 0)


def trim(deltas: torch.Tensor, density: float) -> torch.Tensor:
    """Each delta with only its largest elements, a fraction ``density`` of them."""
    return torch.stack([torch.where(largest(d, count(density, d.numel())), d, 0) for d in deltas])


def _drop(
    delta: torch.Tensor, keep_probability: torch.Tensor | float, draws: torch.Generator, rescale: Rescale
) -> torch.Tensor:
    chance = torch.rand(delta.shape, generator=draws, dtype=torch.float32).to(delta.device)
    kept = torch.where(chance < keep_probability, delta, 0)
    if rescale == "expectation":
        safe = torch.as_tensor(keep_probability, dtype=delta.dtype).clamp(min=torch.finfo(delta.dtype).tiny)
        return torch.where(kept == 0, 0, kept / safe)
    if rescale == "l1":
        before, after = delta.abs().sum(), kept.abs().sum()
        return kept * (before / after) if after > 0 else kept
    return kept


def magnitude(deltas: torch.Tensor, weights: torch.Tensor, *, density: float = 0.2) -> torch.Tensor:
    r"""Trim each delta to its largest elements, and add: :math:`\sum_i w_i\,\mathrm{trim}(\tau_i)` (the trimming of arXiv 2306.01708).

    Args:
        deltas: shape ``(k, ...)``.
        weights: shape ``(k,)``.
        density: fraction kept.
    """
    return consensus(trim(deltas, density), weights, elect=False, normalize="none")


def ties(
    deltas: torch.Tensor, weights: torch.Tensor, *, density: float = 0.2, normalize: Normalize = "weights"
) -> torch.Tensor:
    r"""TIES: trim, elect sign, disjoint merge (arXiv 2306.01708).

    Args:
        deltas: shape ``(k, ...)``.
        weights: shape ``(k,)``.
        density: fraction of each delta that is kept, the largest.
        normalize: "weights" divides by the weights of those that agree, as mergekit does; "count" by their number (the paper's
            disjoint mean); "none" doesn't (its disjoint sum).
    """
    return consensus(trim(deltas, density), weights, elect=True, normalize=normalize)


def _dare(deltas: torch.Tensor, draws: Draws, density: float, rescale: Rescale) -> torch.Tensor:
    return torch.stack([_drop(d, fraction(density), draws(i), rescale) for i, d in enumerate(deltas)])


def dare_linear(
    deltas: torch.Tensor, weights: torch.Tensor, draws: Draws, *, density: float = 0.2, rescale: Rescale = "expectation"
) -> torch.Tensor:
    r"""DARE: drop elements at random and rescale the rest, then add (arXiv 2311.03099).

    Args:
        deltas: shape ``(k, ...)``.
        weights: shape ``(k,)``.
        draws: random generators.
        density: the probability that an element is kept.
        rescale: "expectation" divides by the density, as the paper does; "l1" restores the sum of magnitudes, as mergekit does.
    """
    kept = _dare(deltas, draws, density, rescale)
    return consensus(kept, weights, elect=False, normalize="none")


def dare_ties(
    deltas: torch.Tensor,
    weights: torch.Tensor,
    draws: Draws,
    *,
    density: float = 0.2,
    rescale: Rescale = "expectation",
    normalize: Normalize = "none",
) -> torch.Tensor:
    r"""DARE, then TIES' election of signs (arXiv 2311.03099, 2306.01708).

    Args:
        deltas: shape ``(k, ...)``.
        weights: shape ``(k,)``.
        draws: random generators.
        density: the probability that an element is kept.
        rescale: as in `dare_linear`.
        normalize: as in `ties`.
    """
    kept = _dare(deltas, draws, density, rescale)
    return consensus(kept, weights, elect=True, normalize=normalize)


def without_outliers(delta: torch.Tensor, density: float, gamma: float) -> torch.Tensor:
    """A delta without its largest ``gamma`` and its smallest elements, so that ``density`` of them are left."""
    keep, top = count(density, delta.numel()), count(fraction(gamma, "gamma"), delta.numel())
    top = min(top, delta.numel() - keep)
    return torch.where(largest(delta, keep + top) & ~largest(delta, top), delta, 0)


def breadcrumbs(
    deltas: torch.Tensor, weights: torch.Tensor, *, density: float = 0.9, gamma: float = 0.01
) -> torch.Tensor:
    r"""Model breadcrumbs: drop the largest and the smallest elements, and add (arXiv 2312.06795).

    Args:
        deltas: shape ``(k, ...)``.
        weights: shape ``(k,)``.
        density: fraction kept.
        gamma: fraction of largest elements that is dropped.
    """
    return consensus(
        torch.stack([without_outliers(d, density, gamma) for d in deltas]), weights, elect=False, normalize="none"
    )


def breadcrumbs_ties(
    deltas: torch.Tensor,
    weights: torch.Tensor,
    *,
    density: float = 0.9,
    gamma: float = 0.01,
    normalize: Normalize = "none",
) -> torch.Tensor:
    r"""Model breadcrumbs with TIES' election of signs (arXiv 2312.06795, 2306.01708).

    Args:
        deltas: shape ``(k, ...)``.
        weights: shape ``(k,)``.
        density: fraction kept.
        gamma: fraction of largest elements that is dropped.
        normalize: as in `ties`.
    """
    return consensus(
        torch.stack([without_outliers(d, density, gamma) for d in deltas]), weights, elect=True, normalize=normalize
    )


def _magprune(
    delta: torch.Tensor, density: float, epsilon: float, draws: torch.Generator, rescale: Rescale
) -> torch.Tensor:
    """Keep elements with probabilities that rise with the rank of their magnitude in their row, from density - epsilon to + epsilon."""
    fraction(density)
    rows = delta.reshape(delta.shape[0] if delta.ndim > 1 else 1, -1)
    width = rows.shape[1]
    ranks = rows.abs().argsort(dim=1, stable=True).argsort(dim=1).to(delta.dtype)
    probability = (
        density + epsilon * (2 * ranks / max(width - 1, 1) - 1) if width > 1 else torch.full_like(rows, density)
    )
    return _drop(rows, probability.clamp(0, 1), draws, rescale).reshape(delta.shape)


def _della(deltas: torch.Tensor, draws: Draws, density: float, epsilon: float, rescale: Rescale) -> torch.Tensor:
    return torch.stack([_magprune(d, density, epsilon, draws(i), rescale) for i, d in enumerate(deltas)])


def della_linear(
    deltas: torch.Tensor,
    weights: torch.Tensor,
    draws: Draws,
    *,
    density: float = 0.5,
    epsilon: float = 0.1,
    rescale: Rescale = "expectation",
) -> torch.Tensor:
    r"""DELLA without election: drop at random, the small ones rather than the large, and add (arXiv 2406.11617).

    Args:
        deltas: shape ``(k, ...)``.
        weights: shape ``(k,)``.
        draws: random generators.
        density: the mean probability that an element is kept.
        epsilon: how far the probabilities reach to either side of it, by rank of magnitude within a row.
        rescale: as in `dare_linear`.
    """
    kept = _della(deltas, draws, density, epsilon, rescale)
    return consensus(kept, weights, elect=False, normalize="none")


def della(
    deltas: torch.Tensor, weights: torch.Tensor, draws: Draws, *, density: float = 0.5, epsilon: float = 0.1,
    rescale: Rescale = "expectation", normalize: Normalize = "none",
) -> torch.Tensor:  # fmt: skip
    r"""DELLA: drop by magnitude at random, elect sign, fuse (arXiv 2406.11617).

    Args:
        deltas: shape ``(k, ...)``.
        weights: shape ``(k,)``.
        draws: random generators.
        density: the mean probability that an element is kept.
        epsilon: how far the probabilities reach to either side of it, by rank of magnitude within a row.
        rescale: as in `dare_linear`.
        normalize: as in `ties`.
    """
    kept = _della(deltas, draws, density, epsilon, rescale)
    return consensus(kept, weights, elect=True, normalize=normalize)


def sce(deltas: torch.Tensor, *, select_topk: float = 1.0) -> torch.Tensor:
    r"""SCE: select the elements that vary most, calculate weights from energy, erase minority signs (arXiv 2408.07990).

    Args:
        deltas: shape ``(k, ...)``.
        select_topk: fraction of elements that is kept, by their variance over the inputs.
    """
    if select_topk < 1:
        variance = deltas.var(0, unbiased=False)
        deltas = torch.where(largest(variance, count(select_topk, variance.numel())), deltas, 0)
    energy = deltas.square().reshape(len(deltas), -1).mean(1) if deltas[0].numel() else deltas.new_zeros(len(deltas))
    total = energy.sum()
    weights = energy / total if total > 0 else torch.full_like(energy, 1 / len(deltas))
    return consensus(deltas, weights, elect=True, normalize="weights")


def tall_consensus(deltas: torch.Tensor, *, mask_scale: float = 0.4, agreement: int = 2) -> torch.Tensor:
    r"""Consensus merging with TALL masks: :math:`\tau\,[\sum_i m_i \ge a]`, :math:`m_i = |\tau_i| \ge \lambda|\tau - \tau_i|` (arXiv 2405.07813).

    Args:
        deltas: shape ``(k, ...)``; :math:`\tau` is their sum.
        mask_scale: :math:`\lambda`.
        agreement: how many inputs must need an element for it to be kept.
    """
    total = deltas.sum(0)
    votes = (deltas.abs() >= mask_scale * (total - deltas).abs()).sum(0)
    return torch.where(votes >= agreement, total, 0)
