"""Merging by singular vectors: TSV-M, Iso-C and Iso-CTS. For matrices; other tensors get the mean or the sum of their deltas."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch

from weightops.merging.methods.kept_elements import fraction

Others = Literal["mean", "sum"]


def _by_matrix(
    deltas: torch.Tensor,
    others: Others,
    stacked: int,
    merge: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Apply ``merge``, ``(batch, k, height, width)`` to ``(batch, height, width)``, to deltas of matrices.

    Of ``stacked`` matrices of equal height that lie above each other in one tensor, each is one of the batch.
    """
    if deltas.ndim != 3 or 0 in deltas.shape or len(deltas) == 1:
        return deltas.mean(0) if others == "mean" and deltas.ndim != 3 else deltas.sum(0)
    count = stacked if deltas.shape[1] % stacked == 0 else 1
    return merge(deltas.reshape(len(deltas), count, -1, deltas.shape[2]).transpose(0, 1)).flatten(
        0, 1
    )


def svd(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The thin singular value decomposition; matrices may be stacked in front."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u, s, vh


def _orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """The nearest matrix with orthonormal columns (or rows): the polar factor."""
    u, _, vh = svd(matrix)
    return u @ vh


def _beside(matrices: torch.Tensor) -> torch.Tensor:
    """``(batch, k, height, width)`` side by side: ``(batch, height, k * width)``."""
    return matrices.transpose(1, 2).flatten(2)


def _mean(values: torch.Tensor) -> torch.Tensor:
    return values.mean(1)[:, None, None]


def tsv_m(deltas: torch.Tensor, *, others: Others = "mean", stacked: int = 1) -> torch.Tensor:
    r"""Task singular vectors: keep each task's first 1/k singular triplets, decorrelate them, add (arXiv 2412.00081).

    With :math:`\tau_i = U_i \Sigma_i V_i^T` cut to rank :math:`r / k` and stacked side by side into U, Σ and V, the result is
    :math:`U_\perp \Sigma V_\perp^T`, where :math:`\perp` takes the nearest orthonormal matrix.

    Args:
        deltas: shape ``(k, ...)``.
        others: what tensors that aren't matrices get: the "mean" (the authors' choice) or the "sum" of the deltas.
        stacked: treat so many matrices of equal height apart, such as 3 for q, k and v in ``in_proj_weight``.
    """

    def merge(matrices: torch.Tensor) -> torch.Tensor:
        u, s, vh = svd(matrices)
        rank = max(1, s.shape[-1] // matrices.shape[1])
        left, right = (
            _orthogonal(_beside(u[..., :rank])),
            _orthogonal(vh[..., :rank, :].flatten(1, 2)),
        )
        return (left * s[..., :rank].flatten(1)[:, None]) @ right

    return _by_matrix(deltas, others, stacked, merge)


def iso_c(deltas: torch.Tensor, *, others: Others = "mean", stacked: int = 1) -> torch.Tensor:
    r"""Isotropic merging in the common subspace: the sum of the deltas with all singular values made equal to their mean (arXiv 2502.04959).

    Args:
        deltas: shape ``(k, ...)``.
        others: as in `tsv_m`.
        stacked: as in `tsv_m`.
    """

    def merge(matrices: torch.Tensor) -> torch.Tensor:
        u, s, vh = svd(matrices.sum(1))
        return _mean(s) * (u @ vh)

    return _by_matrix(deltas, others, stacked, merge)


def iso_cts(
    deltas: torch.Tensor, *, common: float = 0.8, others: Others = "mean", stacked: int = 1
) -> torch.Tensor:
    r"""Isotropic merging in the common and task-specific subspaces (arXiv 2502.04959).

    The first ``common`` share of the singular directions is the sum's; the rest are, for each task, the first ones of what
    of its delta lies outside. All are made orthonormal, and all singular values equal to their mean.

    Args:
        deltas: shape ``(k, ...)``.
        common: share of directions that is common.
        others: as in `tsv_m`.
        stacked: as in `tsv_m`.
    """

    def merge(matrices: torch.Tensor) -> torch.Tensor:
        k = matrices.shape[1]
        u, s, vh = svd(matrices.sum(1))
        count = s.shape[-1]
        own = (count - int(count * fraction(common, "common"))) // k
        shared = count - own * k
        if own == 0:
            return _mean(s) * (u @ vh)
        basis = u[..., :shared]
        rest = matrices - basis[:, None] @ (basis.mT[:, None] @ matrices)
        ru, rs, rvh = svd(rest)
        left = _orthogonal(torch.cat([basis, _beside(ru[..., :own])], dim=-1))
        right = _orthogonal(torch.cat([vh[:, :shared], rvh[..., :own, :].flatten(1, 2)], dim=1))
        return _mean(torch.cat([s[:, :shared], rs[..., :own].flatten(1)], dim=1)) * (left @ right)

    return _by_matrix(deltas, others, stacked, merge)
