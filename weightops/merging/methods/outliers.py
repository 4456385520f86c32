"""Breadcrumbs: drop the largest elements of each delta, and the smallest."""

from __future__ import annotations

from weightops.algebra.names import Each
from weightops.errors import OptionError
from weightops.merging.methods.consensus import Divisor, Normalize, consensus, restoring_scale
from weightops.merging.methods.inputs import ModelInputs, TensorInputs
from weightops.merging.methods.kept_elements import NONE, Cutoff
from weightops.merging.methods.method import chunks
from weightops.merging.methods.option_values import fraction, kept_count, per_input
from weightops.merging.methods.trimming import Rescale, RowScope, scope_cutoffs
from weightops.support.lazy import torch


def elements_between_outliers(
    inputs: TensorInputs,
    model_inputs: ModelInputs,
    density: float | Each,
    gamma: float | Each,
    scope: RowScope,
) -> list[list[Cutoff]]:
    """Return two cutoffs for each input: of its kept elements and its outliers, and of these."""
    if scope == "row":
        return []
    densities, gammas = per_input(density, inputs.k), per_input(gamma, inputs.k)

    def counts(i: int, n: int) -> list[int]:
        kept = kept_count(densities[i], n)
        dropped = min(int(fraction(gammas[i], "gamma") * n), n - kept)
        return [kept + dropped, dropped]

    return scope_cutoffs(inputs, model_inputs, scope, "changed", counts)


def last_dimension(inputs: TensorInputs) -> int:
    """Return the length of a row of the last dimension: 0 for a single number."""
    return inputs.shape[-1] if inputs.shape else 0


def _drop_outliers(deltas: torch.Tensor, between: list[list[Cutoff]], start: int) -> torch.Tensor:
    """Set the largest and the smallest elements of each delta to 0, in place."""
    for delta, (lower, upper) in zip(deltas.flatten(1), between, strict=True):
        if upper != NONE:
            delta -= upper.keep(delta.clone(), start)
        lower.keep(delta, start)
    return deltas


def _drop_outliers_of_rows(
    deltas: torch.Tensor, length: int, density: float | Each, gamma: float | Each
) -> torch.Tensor:
    """Set the largest and the smallest elements of each row to 0, in place.

    Args:
        deltas: shape ``(k, ...)``, of whole rows.
        length: the elements of a row; 0 for a single number, which is kept.
        density: the fraction of a row that is kept.
        gamma: the fraction of a row that is dropped as the largest.
    """
    if not length:
        return deltas
    pairs = zip(per_input(density, len(deltas)), per_input(gamma, len(deltas)), strict=True)
    for delta, (kept, dropped) in zip(deltas, pairs, strict=True):
        rows = delta.view(-1, length)
        first = int(fraction(dropped, "gamma") * length)
        last = first + int(fraction(kept) * length)
        order = rows.abs().argsort(dim=-1, descending=True, stable=True)[:, first:last]
        rows.copy_(torch.zeros_like(rows).scatter_(-1, order, rows.gather(-1, order)))
    return deltas


def scale_without_outliers(
    inputs: TensorInputs, between: list[list[Cutoff]], rescale: Rescale, scope: RowScope
) -> torch.Tensor | None:
    """Return the factors of the deltas of Breadcrumbs, shape ``(k,)``; None for 1."""
    if rescale == "none":
        return None
    if scope == "row":
        raise OptionError("rescale goes with the scopes tensor and global, not with row")
    return restoring_scale(inputs, lambda chunk: _drop_outliers(chunk.values, between, chunk.start))


@chunks(
    between=elements_between_outliers,
    scale=scale_without_outliers,
    length=last_dimension,
    by_rows=True,
)
def breadcrumbs(
    deltas: torch.Tensor,
    weights: torch.Tensor,
    between: list[list[Cutoff]],
    length: int,
    start: int,
    scale: torch.Tensor | None,
    *,
    density: float | Each = 0.9,
    gamma: float | Each = 0.01,
    scope: RowScope = "tensor",
    normalize: Divisor = "none",
    rescale: Rescale = "none",
) -> torch.Tensor:
    """Drop the largest and the smallest elements of each delta, and add the deltas (Breadcrumbs).

        merged = sum_i w_i m_i tau_i

    m_i is 0 for the largest elements, a fraction gamma of them, 1 for the next ones, a fraction
    density, and 0 for the rest.

    Source: arXiv 2312.06795. Its authors' code begins with density 0.15, gamma 0.006 and rows.

    Args:
        deltas: shape ``(k, rows, width)``.
        weights: shape ``(k,)``.
        between: the cutoffs of each delta.
        length: the elements of a row of the last dimension.
        start: the position of the part.
        scale: the factor of each delta, shape ``(k,)``, or None.
        density: the fraction of the elements that is kept.
        gamma: the fraction of the elements that is dropped as the largest.
        scope: "tensor" takes these fractions of each tensor, as mergekit does; "row" of each row of
            the last dimension, rounded down, as the authors do; "global" of all that an input
            changes in the model.
        normalize: "weights" divides by sum_i w_i, where that isn't 0.
        rescale: "l1" restores the sum of magnitudes of each delta, as mergekit does; "none"
            leaves it smaller.
    """
    if scope == "row":
        kept = _drop_outliers_of_rows(deltas, length, density, gamma)
    else:
        kept = _drop_outliers(deltas, between, start)
    return consensus(kept, weights, scale=scale, elect=False, normalize=normalize)


@chunks(
    between=elements_between_outliers,
    scale=scale_without_outliers,
    length=last_dimension,
    by_rows=True,
)
def breadcrumbs_ties(
    deltas: torch.Tensor,
    weights: torch.Tensor,
    between: list[list[Cutoff]],
    length: int,
    start: int,
    scale: torch.Tensor | None,
    *,
    density: float | Each = 0.9,
    gamma: float | Each = 0.01,
    normalize: Normalize = "none",
    scope: RowScope = "tensor",
    rescale: Rescale = "none",
) -> torch.Tensor:
    """Drop the largest and smallest elements, elect signs, and add the deltas of the elected signs.

        t_i = m_i tau_i, with m_i as in breadcrumbs
        sign = sgn(sum_i w_i t_i)
        agree_i = 1 where w_i t_i sign > 0, else 0
        merged = sum_i agree_i w_i t_i / n

    Source: arXiv 2312.06795, and 2306.01708 for the election.

    Args:
        deltas: shape ``(k, rows, width)``.
        weights: shape ``(k,)``.
        between: the cutoffs of each delta.
        length: the elements of a row of the last dimension.
        start: the position of the part.
        scale: the factor of each delta, shape ``(k,)``, or None.
        density: the fraction of the elements that is kept.
        gamma: the fraction of the elements that is dropped as the largest.
        normalize: the divisor n: "weights" is sum_i agree_i w_i, "count" is sum_i agree_i, "none"
            is 1.
        scope: "tensor" takes these fractions of each tensor, as mergekit does; "row" of each row of
            the last dimension, rounded down, as the authors of Breadcrumbs do; "global" of all that
            an input changes in the model.
        rescale: "l1" restores the sum of magnitudes of each delta, as mergekit does; "none"
            leaves it smaller.
    """
    if scope == "row":
        kept = _drop_outliers_of_rows(deltas, length, density, gamma)
    else:
        kept = _drop_outliers(deltas, between, start)
    return consensus(kept, weights, scale=scale, elect=True, normalize=normalize)
