"""Methods on singular vectors: TSV-M, Iso-C and Iso-CTS.

They merge matrices. For other tensors they return the mean or the sum of the deltas.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch

from weightops.merging.methods.option_values import fraction

Others = Literal["mean", "sum"]


def _by_matrix(
    deltas: torch.Tensor,
    others: Others,
    stacked: int,
    merge: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Merge the deltas of a matrix, or of matrices of equal height that are stacked in one tensor.

    Args:
        deltas: shape ``(k, ...)``.
        others: what to return for tensors that aren't matrices.
        stacked: the number of matrices in the tensor.
        merge: function of ``(batch, k, height, width)`` that returns ``(batch, height, width)``.
    """
    if deltas.ndim != 3 or 0 in deltas.shape or len(deltas) == 1:
        return deltas.mean(0) if others == "mean" and deltas.ndim != 3 else deltas.sum(0)
    count = stacked if deltas.shape[1] % stacked == 0 else 1
    matrices = deltas.reshape(len(deltas), count, -1, deltas.shape[2]).transpose(0, 1)
    return merge(matrices).flatten(0, 1)


def _svd(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the thin singular value decomposition of matrices, shape ``(..., height, width)``."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u, s, vh


def _orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """Return the nearest matrix with orthonormal columns, or rows: the polar factor."""
    u, _, vh = _svd(matrix)
    return u @ vh


def _side_by_side(matrices: torch.Tensor) -> torch.Tensor:
    """Return ``(batch, k, height, width)`` as ``(batch, height, k * width)``."""
    return matrices.transpose(1, 2).flatten(2)


def _mean(values: torch.Tensor) -> torch.Tensor:
    return values.mean(1)[:, None, None]


def tsv_m(deltas: torch.Tensor, *, others: Others = "mean", stacked: int = 1) -> torch.Tensor:
    """Keep the first 1/k of each task's singular vectors, decorrelate them, and add (TSV-M).

        tau_i = U_i S_i V_i', cut to rank r / k
        merged = orth([U_1 ... U_k]) diag(S_1, ..., S_k) orth([V_1 ... V_k])'

    orth is the nearest matrix with orthonormal columns.

    Source: task singular vectors, arXiv 2412.00081.

    Args:
        deltas: shape ``(k, ...)``.
        others: for tensors that aren't matrices, the "mean" of the deltas, as the authors take, or
            their "sum".
        stacked: the number of matrices of equal height that a tensor holds and that are merged
            separately, such as 3 for q, k and v in ``in_proj_weight``.
    """

    def merge(matrices: torch.Tensor) -> torch.Tensor:
        u, s, vh = _svd(matrices)
        rank = max(1, s.shape[-1] // matrices.shape[1])
        left = _orthogonal(_side_by_side(u[..., :rank]))
        right = _orthogonal(vh[..., :rank, :].flatten(1, 2))
        return (left * s[..., :rank].flatten(1)[:, None]) @ right

    return _by_matrix(deltas, others, stacked, merge)


def iso_c(deltas: torch.Tensor, *, others: Others = "mean", stacked: int = 1) -> torch.Tensor:
    """Add the deltas, and set all singular values of the sum to their mean (Iso-C).

        sum_i tau_i = U S V'
        merged = mean(S) U V'

    Source: isotropic merging in the common subspace, arXiv 2502.04959.

    Args:
        deltas: shape ``(k, ...)``.
        others: for tensors that aren't matrices, the "mean" of the deltas or their "sum".
        stacked: the number of matrices of equal height that a tensor holds and that are merged
            separately, such as 3 for q, k and v in ``in_proj_weight``.
    """

    def merge(matrices: torch.Tensor) -> torch.Tensor:
        u, s, vh = _svd(matrices.sum(1))
        return _mean(s) * (u @ vh)

    return _by_matrix(deltas, others, stacked, merge)


def iso_cts(
    deltas: torch.Tensor, *, common: float = 0.8, others: Others = "mean", stacked: int = 1
) -> torch.Tensor:
    """Merge common and task-specific singular vectors with equal singular values (Iso-CTS).

        U = orth([U_0 U_1 ... U_k]), V = orth([V_0 V_1 ... V_k])
        merged = mean(S) U V'

    U_0 and V_0 are the first singular vectors of the sum of the deltas, the share ``common`` of
    them. U_i and V_i are the first ones of the part of tau_i outside of U_0.

    Source: isotropic merging in common and task-specific subspaces, arXiv 2502.04959.

    Args:
        deltas: shape ``(k, ...)``.
        common: the share of the singular vectors that is common.
        others: for tensors that aren't matrices, the "mean" of the deltas or their "sum".
        stacked: the number of matrices of equal height that a tensor holds and that are merged
            separately, such as 3 for q, k and v in ``in_proj_weight``.
    """

    def merge(matrices: torch.Tensor) -> torch.Tensor:
        k = matrices.shape[1]
        u, s, vh = _svd(matrices.sum(1))
        count = s.shape[-1]
        own = (count - int(count * fraction(common, "common"))) // k
        shared = count - own * k
        if own == 0:
            return _mean(s) * (u @ vh)
        basis = u[..., :shared]
        rest = matrices - basis[:, None] @ (basis.mT[:, None] @ matrices)
        own_u, own_s, own_vh = _svd(rest)
        left = _orthogonal(torch.cat([basis, _side_by_side(own_u[..., :own])], dim=-1))
        right = _orthogonal(torch.cat([vh[:, :shared], own_vh[..., :own, :].flatten(1, 2)], dim=1))
        values = torch.cat([s[:, :shared], own_s[..., :own].flatten(1)], dim=1)
        return _mean(values) * (left @ right)

    return _by_matrix(deltas, others, stacked, merge)
