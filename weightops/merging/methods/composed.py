"""Methods around another method: KnOTS before it, subspace boosting after it."""

from __future__ import annotations

from typing import Any

import torch

from weightops.algebra.linear_form import LinearForm
from weightops.algebra.scratch import Scratch
from weightops.checkpoints.formats.memory import MemorySource
from weightops.errors import OptionError
from weightops.merging.methods.option_values import fraction
from weightops.merging.methods.spectral import decompose

_RANK = 1e-5
"""The share of the largest singular value below which a direction is rounding: float32 weights
differ by about as much without any change."""


def knots(
    deltas: torch.Tensor, weights: torch.Tensor, *, then: str = "ties", density: float = 0.2
) -> torch.Tensor:
    """Align the deltas by one joint decomposition, and merge the aligned parts (KnOTS).

        [tau_1 ... tau_k] = U S [V_1 ... V_k]'
        merged = U S m(V_1', ..., V_k')

    m is another method, TIES by default. It is meant for adapters, whose deltas have few directions
    that hardly agree. Tensors that aren't matrices are merged by m as they are.

    Source: arXiv 2410.19735.

    Args:
        deltas: shape ``(k, ...)``.
        weights: shape ``(k,)``.
        then: the name of a method on task vectors.
        density: its option of this name, if it has one.
    """
    if deltas.ndim != 3 or 0 in deltas.shape or not bool(deltas.any()):
        return _merged_by(then, deltas, weights, density)
    u, s, vh = decompose(torch.cat(list(deltas), dim=1))
    rank = int((s > _RANK * s[0]).sum())
    parts = torch.stack(vh[:rank].chunk(len(deltas), dim=1)).to(deltas.dtype)
    merged = _merged_by(then, parts, weights, density)
    return ((u[:, :rank] * s[:rank]) @ merged.double()).to(deltas.dtype)


def subspace_boosting(
    deltas: torch.Tensor,
    weights: torch.Tensor,
    *,
    then: str = "task_arithmetic",
    density: float = 0.2,
    beta: float = 0.01,
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
    """
    fraction(beta, "beta")
    merged = _merged_by(then, deltas, weights, density)
    if merged.ndim != 2 or not merged.numel() or not bool(merged.any()):
        return merged
    u, s, vh = decompose(merged)
    reached = (s.cumsum(0) >= beta * s.sum()).nonzero()
    level = s[int(reached[0])] if len(reached) else s[-1]
    return ((u * s.clamp(min=level)) @ vh).to(deltas.dtype)


def _merged_by(
    method: str, deltas: torch.Tensor, weights: torch.Tensor, density: float
) -> torch.Tensor:
    """Merge deltas by another method.

    Raises:
        OptionError: if it isn't a method on task vectors without statistics, or one of these two.
    """
    from weightops.merging.methods.source import MethodSource
    from weightops.merging.methods.table import METHODS

    chosen = METHODS[method]
    own = (knots.__name__, subspace_boosting.__name__)
    if chosen.space != "delta" or chosen.statistics or method in own:
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
