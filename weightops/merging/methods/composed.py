"""Methods around another method: KnOTS before it, subspace boosting after it."""

from __future__ import annotations

from typing import Any

from weightops.algebra.linear_form import LinearForm
from weightops.algebra.scratch import Scratch
from weightops.algebra.source import Factors
from weightops.checkpoints.formats.memory import MemorySource
from weightops.errors import OptionError
from weightops.merging.methods.low_rank import nonfinite
from weightops.merging.methods.method import with_factors
from weightops.merging.methods.option_values import fraction
from weightops.merging.methods.spectral import by_matrix, decompose
from weightops.support.lazy import torch
from weightops.support.registry import unknown

_RANK = 1e-5
"""The share of the largest singular value below which a direction is rounding: float32 weights
differ by about as much without any change."""


def _of_factors(
    factors: list[Factors], weights: torch.Tensor, then: str, density: float, scaled: bool
) -> Factors:
    """Return the factors of what `knots` gives, from those of the deltas.

        [B_1 A_1 ... B_k A_k] = Q_b (R_b diag(R_1', ..., R_k')) diag(Q_1', ..., Q_k')

    where ``[B_1 ... B_k] = Q_b R_b`` and ``A_i' = Q_i R_i``. The matrix in the middle is small.
    """
    undefined = nonfinite(factors)
    if undefined:
        return undefined
    outer, inner = torch.linalg.qr(torch.cat([left for left, _ in factors], dim=1).double())
    rows = [torch.linalg.qr(right.double().mT) for _, right in factors]
    middle = inner @ torch.block_diag(*(triangle.mT for _, triangle in rows))  # type: ignore[no-untyped-call]
    if not bool(middle.any()):
        return outer[:, :0], factors[0][1][:0].double()
    basis, joint = _decompose_jointly(middle, scaled)
    widths = [orthogonal.shape[1] for orthogonal, _ in rows]
    pieces = zip(joint.split_with_sizes(widths, dim=1), rows, strict=True)
    parts = torch.stack([piece @ orthogonal.mT for piece, (orthogonal, _) in pieces])
    merged = _merged_by(then, parts.to(factors[0][1].dtype), weights, density)
    return outer @ basis, merged.double()


def _decompose_jointly(matrix: torch.Tensor, scaled: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the basis ``U S`` and ``V'`` of a matrix; or ``U`` and ``S V'``."""
    u, s, vh = decompose(matrix)
    rank = int((s > _RANK * s[0]).sum())
    u, s, vh = u[:, :rank], s[:rank], vh[:rank]
    return (u, s[:, None] * vh) if scaled else (u * s, vh)


@with_factors(_of_factors)
def knots(
    deltas: torch.Tensor,
    weights: torch.Tensor,
    *,
    then: str = "ties",
    density: float = 0.2,
    scaled: bool = False,
) -> torch.Tensor:
    """Align the deltas by one joint decomposition, and merge the aligned parts (KnOTS).

        [tau_1 ... tau_k] = U S [V_1 ... V_k]'
        merged = U S m(V_1', ..., V_k'), or U m(S V_1', ..., S V_k')

    m is another method, TIES by default. It is meant for adapters, whose deltas have few directions
    that hardly agree: of LoRA adapters, only the two matrices are read and decomposed, and what
    they are merged into is an adapter again. Tensors that aren't matrices are merged by m as they
    are.

    Source: arXiv 2410.19735.

    Args:
        deltas: shape ``(k, ...)``.
        weights: shape ``(k,)``.
        then: the name of a method on task vectors.
        density: its option of this name, if it has one.
        scaled: merge ``S V_i'``, as the authors' code does, whose TIES trims over all matrices at
            once, and so keeps more of those that change more; here each is trimmed by itself. It is
            the same for methods that don't compare magnitudes.
    """
    if deltas.ndim != 3 or 0 in deltas.shape or not bool(deltas.any()):
        return _merged_by(then, deltas, weights, density)
    basis, joint = _decompose_jointly(torch.cat(list(deltas), dim=1), scaled)
    parts = torch.stack(joint.chunk(len(deltas), dim=1)).to(deltas.dtype)
    merged = _merged_by(then, parts, weights, density)
    return (basis @ merged.double()).to(deltas.dtype)


def subspace_boosting(
    deltas: torch.Tensor,
    weights: torch.Tensor,
    *,
    then: str = "task_arithmetic",
    density: float = 0.2,
    beta: float = 0.01,
    stacked: int = 1,
    spectral: bool = True,
) -> torch.Tensor:
    """Merge by another method, and raise the small singular values of the result.

        m(tau_1, ..., tau_k) = U S V'
        merged = U max(S, S_j) V'

    S_j is the first singular value at which the sum of the largest ones reaches the share ``beta``
    of the sum of all. Tensors that aren't matrices stay as m merges them.

    Source: arXiv 2506.16506.

    Args:
        deltas: shape ``(k, ...)``.
        weights: shape ``(k,)``.
        then: the name of a method on task vectors.
        density: its option of this name, if it has one.
        beta: the share of the sum of singular values above which all are raised to one level.
        stacked: the number of matrices of equal height that a tensor holds and that are raised
            separately, such as 3 for q, k and v in ``in_proj_weight``.
        spectral: raise the singular values of matrices; by name pattern, ``{"*embed*": false}``
            leaves some as m merges them. The authors' code raises those of attention and MLP.
    """
    fraction(beta, "beta")

    def raised(matrices: torch.Tensor) -> torch.Tensor:
        matrix = matrices[0]
        if not bool(matrix.any()):
            return torch.zeros_like(matrix, dtype=torch.float64)
        u, s, vh = decompose(matrix)
        reached = (s.cumsum(0) >= beta * s.sum()).nonzero()
        level = s[int(reached[0])] if len(reached) else s[-1]
        result: torch.Tensor = (u * s.clamp(min=level)) @ vh
        return result

    merged = _merged_by(then, deltas, weights, density)[None]
    return by_matrix(merged, "sum", stacked, spectral, raised)


def _merged_by(
    method: str, deltas: torch.Tensor, weights: torch.Tensor, density: float
) -> torch.Tensor:
    """Merge deltas by another method.

    Raises:
        UnknownNameError: if there is no such method.
        OptionError: if it isn't a method on task vectors without statistics, or one of these two.
    """
    from weightops.merging.methods.source import MethodSource
    from weightops.merging.methods.table import METHODS

    def leads(name: str) -> bool:
        other = METHODS[name]
        own = ("knots", "subspace_boosting")
        return other.space == "delta" and not other.statistics and name not in own

    if method not in METHODS:
        raise unknown("merge method", method, filter(leads, METHODS))
    chosen = METHODS[method]
    if not leads(method):
        raise OptionError(f"{method} isn't a method on task vectors that another can lead to")
    options: dict[str, Any] = {"density": density} if "density" in chosen.options else {}
    forms = []
    for i, delta in enumerate(deltas):
        source = MemorySource({"w": delta}, f"part {i}", identity=("part", i))
        source.space = "delta"
        forms.append(LinearForm.of(source))
    given = None if bool((weights == 1).all()) else weights.tolist()
    merged = MethodSource(chosen, forms, weights=given, options=options)
    flat = merged.open("w", Scratch(deltas.device))(0, deltas[0].numel())
    return flat.clone().reshape(deltas.shape[1:])
