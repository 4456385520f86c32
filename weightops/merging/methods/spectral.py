"""Methods on singular vectors: TSV-M, Iso-C and Iso-CTS.

They merge matrices. For other tensors they return the mean or the sum of the deltas. All of them
compute in float64, so that results for different numbers of threads agree within 1e-6 of the
tensor's largest value. Directions in which a matrix is exactly zero stay zero.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from weightops.algebra.kernels import add_gram
from weightops.errors import OptionError
from weightops.merging.methods.option_values import fraction
from weightops.support.lazy import torch

Others = Literal["mean", "sum"]

_CONDITION = 1e-4
"""The ratio of singular values down to which eigenvectors of a Gram matrix in float64 are exact
enough: their error is about 1e-16 over its square."""


def by_matrix(
    deltas: torch.Tensor,
    others: Others,
    stacked: int,
    spectral: bool,
    merge: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Merge the deltas of a matrix, or of matrices of equal height that are stacked in one tensor.

    Args:
        deltas: shape ``(k, ...)``.
        others: what to return for tensors that aren't matrices.
        stacked: the number of matrices in the tensor.
        spectral: treat the tensor as a matrix if it is one.
        merge: function of ``(k, height, width)``, which is float64 or not, that returns
            ``(height, width)`` in float64.

    Raises:
        OptionError: if there are fewer matrices than one.
    """
    if stacked < 1:
        raise OptionError(f"stacked is a number of matrices, at least 1, not {stacked}")
    if deltas.ndim != 3 or not spectral or 0 in deltas.shape:
        return deltas.mean(0) if others == "mean" else deltas.sum(0)
    count = stacked if deltas.shape[1] % stacked == 0 else 1
    return torch.cat([merge(part) for part in deltas.chunk(count, dim=1)]).to(deltas.dtype)


def decompose(
    matrix: torch.Tensor, rank: int | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the thin singular value decomposition in float64, cut to a rank.

    It is that of the smaller Gram matrix, which takes half of the time, where this is exact enough.
    Singular vectors of zero singular values are zero.
    """
    wide, tall = _as_wide(matrix)
    squares, vectors = _eigenvectors(wide)
    left, s = vectors.flip(-1)[:, :rank], squares.flip(-1)[:rank].clamp(min=0).sqrt()
    if s[-1] > _CONDITION * s[0]:
        right = (left.mT @ wide) / s[:, None]
    else:
        left, s, right = _decompose_exactly(wide, rank)
    return (right.mT, s, left.mT) if tall else (left, s, right)


def _as_wide(matrix: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """Return a matrix, or its transpose if it is tall, in float64; and whether it is tall."""
    tall = matrix.shape[0] > matrix.shape[1]
    return (matrix.mT if tall else matrix).double(), tall


def _eigenvectors(wide: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the eigenvalues and eigenvectors of the smaller Gram matrix of a wide matrix."""
    gram = wide.new_zeros(len(wide), len(wide))
    add_gram(gram, wide.mT)
    squares, vectors = torch.linalg.eigh(gram)  # reads the lower triangle
    return squares, vectors


def _decompose_exactly(
    wide: torch.Tensor, rank: int | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the decomposition of a wide matrix, from its transpose, which is the faster one."""
    v, s, u = torch.linalg.svd(wide.mT, full_matrices=False)
    s = s[:rank]
    exists = s > s[0] * max(wide.shape) * torch.finfo(s.dtype).eps
    return u.mT[:, :rank] * exists, s, v.mT[:rank] * exists[:, None]


def _flattened(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a matrix with all its singular values set to 1, and these values.

    It is the polar factor: the nearest matrix with orthonormal columns, or rows.
    """
    wide, tall = _as_wide(matrix)
    flat = None
    if wide.shape[0] < wide.shape[1]:  # a square matrix has too small singular values, mostly
        squares, vectors = _eigenvectors(wide)
        s = squares.clamp(min=0).sqrt()
        if s[0] > _CONDITION * s[-1]:
            flat = ((vectors / s) @ vectors.mT) @ wide
    if flat is None:
        left, s, right = _decompose_exactly(wide, None)
        flat = left @ right
    return (flat.mT if tall else flat), s


def _orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """Return the polar factor of a matrix."""
    return _flattened(matrix)[0]


def tsv_m(
    deltas: torch.Tensor, *, others: Others = "mean", stacked: int = 1, spectral: bool = True
) -> torch.Tensor:
    """Keep the first 1/k of each task's singular vectors, decorrelate them, and add (TSV-M).

        tau_i = U_i S_i V_i', cut to rank r / k, at least 1
        merged = orth([U_1 ... U_k]) diag(S_1, ..., S_k) orth([V_1 ... V_k])'

    orth is the nearest matrix with orthonormal columns.

    Source: task singular vectors, arXiv 2412.00081.

    Args:
        deltas: shape ``(k, ...)``.
        others: for tensors that aren't matrices, the "mean" of the deltas, as the authors take, or
            their "sum".
        stacked: the number of matrices of equal height that a tensor holds and that are merged
            separately, such as 3 for q, k and v in ``in_proj_weight``.
        spectral: merge matrices by singular vectors; by name pattern, ``{text_projection: false}``
            treats a matrix as others are, as the authors do.
    """

    def merge(matrices: torch.Tensor) -> torch.Tensor:
        rank = max(1, min(matrices.shape[1:]) // len(matrices))
        parts = [decompose(matrix, rank) for matrix in matrices]
        left = _orthogonal(torch.cat([u for u, _, _ in parts], dim=1))
        right = _orthogonal(torch.cat([vh for _, _, vh in parts]))
        return (left * torch.cat([s for _, s, _ in parts])) @ right

    return by_matrix(deltas, others, stacked, spectral, merge)


def iso_c(
    deltas: torch.Tensor, *, others: Others = "mean", stacked: int = 1, spectral: bool = True
) -> torch.Tensor:
    """Add the deltas, and set all singular values of the sum to their mean (Iso-C).

        sum_i tau_i = U S V'
        merged = mean(S) U V'

    A delta of few directions that is rounded to its dtype, such as that of an adapter merged into
    weights, has others that are mere rounding, which get the mean, too: merge the adapters by
    `knots` instead.

    Source: isotropic merging in the common subspace, arXiv 2502.04959.

    Args:
        deltas: shape ``(k, ...)``.
        others: for tensors that aren't matrices, the "mean" of the deltas or their "sum".
        stacked: the number of matrices of equal height that a tensor holds and that are merged
            separately, such as 3 for q, k and v in ``in_proj_weight``.
        spectral: merge matrices by singular vectors; by name pattern, ``{text_projection: false}``
            treats a matrix as others are, as the authors do.
    """

    def merge(matrices: torch.Tensor) -> torch.Tensor:
        flat, s = _flattened(matrices.sum(0, dtype=torch.float64))
        return s.mean() * flat

    return by_matrix(deltas, others, stacked, spectral, merge)


def iso_cts(
    deltas: torch.Tensor,
    *,
    common: float = 0.8,
    others: Others = "mean",
    stacked: int = 1,
    spectral: bool = True,
) -> torch.Tensor:
    """Merge common and task-specific singular vectors with equal singular values (Iso-CTS).

        U = orth([U_0 U_1 ... U_k]), V = orth([V_0 V_1 ... V_k])
        merged = mean(S) U V'

    U_0 and V_0 are the first singular vectors of the sum of the deltas, about the share ``common``
    of them. U_i and V_i are the first ones of the part of tau_i outside of U_0: each task has as
    many, ``round(rest / k)``, or fewer where there aren't so many.

    Source: isotropic merging in common and task-specific subspaces, arXiv 2502.04959.

    Args:
        deltas: shape ``(k, ...)``.
        common: the share of the singular vectors that is common.
        others: for tensors that aren't matrices, the "mean" of the deltas or their "sum".
        stacked: the number of matrices of equal height that a tensor holds and that are merged
            separately, such as 3 for q, k and v in ``in_proj_weight``.
        spectral: merge matrices by singular vectors; by name pattern, ``{text_projection: false}``
            treats a matrix as others are, as the authors do.
    """

    def merge(matrices: torch.Tensor) -> torch.Tensor:
        k, count = len(matrices), min(matrices.shape[1:])
        u, s, vh = decompose(matrices.sum(0, dtype=torch.float64))
        own = min(round((count - int(count * fraction(common, "common"))) / k), count // k)
        shared = count - own * k
        basis = u[:, :shared]
        parts = [(basis, s[:shared], vh[:shared])]
        if own:
            rests = (matrix - basis @ (basis.mT @ matrix) for matrix in matrices.double())
            parts += [decompose(rest, own) for rest in rests]
        left = _orthogonal(torch.cat([part for part, _, _ in parts], dim=1))
        right = _orthogonal(torch.cat([part for _, _, part in parts]))
        return torch.cat([part for _, part, _ in parts]).mean() * (left @ right)

    return by_matrix(deltas, others, stacked, spectral, merge)
