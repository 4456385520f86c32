"""Methods that keep elements by magnitude: trimming and TIES."""

from __future__ import annotations

from typing import Literal

from weightops.algebra.kernels import add_rows
from weightops.algebra.names import Each
from weightops.merging.methods.consensus import (
    Normalize,
    consensus,
    divide_,
    flags,
    multiply_,
    restoring_scale,
)
from weightops.merging.methods.inputs import ModelInputs, TensorInputs
from weightops.merging.methods.kept_elements import Counts, Cutoff, cutoffs
from weightops.merging.methods.method import chunks
from weightops.merging.methods.option_values import fraction, kept_count, per_input
from weightops.support.lazy import torch

Scope = Literal["tensor", "global"]
RowScope = Literal["tensor", "row", "global"]
Count = Literal["all", "changed"]
Rescale = Literal["none", "l1"]


def scope_cutoffs(
    inputs: TensorInputs, model_inputs: ModelInputs, scope: RowScope, count: Count, counts: Counts
) -> list[list[Cutoff]]:
    """Return cutoffs for each input: over the tensor, or over all tensors."""
    if scope != "global":
        return cutoffs(inputs, counts)
    key = (count, *(tuple(counts(i, 10**9)) for i in range(model_inputs.k)))
    changed = count == "changed"
    found = model_inputs.once(key, lambda: cutoffs(model_inputs, counts, of_nonzero=changed))
    start = model_inputs.starts[inputs.name]
    return [[cutoff.counted_from(start) for cutoff in row] for row in found]


def largest_elements(
    inputs: TensorInputs,
    model_inputs: ModelInputs,
    density: float | Each,
    scope: Scope,
    count: Count,
) -> list[Cutoff]:
    """Return the cutoff of each input's largest elements, a fraction ``density`` of them.

    Of elements that equal the smallest of them, a tensor keeps the first ones, and a model all: the
    first layers would keep more of a bfloat16 model than the others.
    """
    densities = per_input(density, inputs.k)

    def counts(i: int, n: int) -> list[int]:
        if scope == "global" and count == "all" and densities[i] > 0:
            return [min(int(fraction(densities[i]) * n) + 1, n)]
        return [kept_count(densities[i], n)]

    found = [cutoff for [cutoff] in scope_cutoffs(inputs, model_inputs, scope, count, counts)]
    if scope != "global":
        return found
    return [cutoff._replace(position=model_inputs.numel) for cutoff in found]


def _trim(deltas: torch.Tensor, largest: list[Cutoff], start: int) -> torch.Tensor:
    """Set all but the largest elements of each delta to 0, in place."""
    for delta, cutoff in zip(deltas, largest, strict=True):
        cutoff.keep(delta, start)
    return deltas


@chunks(largest=largest_elements)
def magnitude(
    deltas: torch.Tensor,
    weights: torch.Tensor,
    largest: list[Cutoff],
    start: int,
    *,
    density: float | Each = 0.2,
    scope: Scope = "tensor",
    count: Count = "all",
) -> torch.Tensor:
    """Trim each delta to its largest elements, and add the deltas.

        t_i = tau_i at its largest elements, else 0
        merged = sum_i w_i t_i

    Source: the trimming of TIES, arXiv 2306.01708.

    Args:
        deltas: shape ``(k, n)``.
        weights: shape ``(k,)``.
        largest: the cutoff of each delta.
        start: the position of the part.
        density: the fraction of the elements that is kept.
        scope: "tensor" keeps this fraction of each tensor, of equal elements the first ones, as
            mergekit does; "global" of the model as a whole, and all that equal the smallest of
            them, as the authors do: in bfloat16 many are equal.
        count: for scope "global", what the density is a fraction of: "all" elements, frozen ones,
            too, as the authors count, who keep ``int(density n) + 1``; or the "changed" ones.
    """
    return consensus(_trim(deltas, largest, start), weights, elect=False, normalize="none")


def scale_after_trimming(
    inputs: TensorInputs, largest: list[Cutoff], rescale: Rescale
) -> torch.Tensor | None:
    """Return the factors of trimmed deltas, shape ``(k,)``; None if they keep their size."""
    if rescale == "none":
        return None
    return restoring_scale(inputs, lambda chunk: _trim(chunk.values, largest, chunk.start))


@chunks(largest=largest_elements, scale=scale_after_trimming)
def ties(
    deltas: torch.Tensor,
    weights: torch.Tensor,
    largest: list[Cutoff],
    start: int,
    scale: torch.Tensor | None,
    *,
    density: float | Each = 0.2,
    normalize: Normalize = "weights",
    scope: Scope = "tensor",
    count: Count = "all",
    rescale: Rescale = "none",
) -> torch.Tensor:
    """Trim each delta, elect a sign for each element, and average the deltas of this sign (TIES).

        t_i = tau_i at its largest elements, else 0
        sign = sgn(sum_i w_i t_i)
        agree_i = 1 where w_i t_i sign > 0, else 0
        merged = sum_i agree_i w_i t_i / n

    Where the sum is 0, the sign is 1; the authors take there the one that most elements of the
    model have.

    Source: arXiv 2306.01708.

    Args:
        deltas: shape ``(k, n)``.
        weights: shape ``(k,)``.
        largest: the cutoff of each delta.
        start: the position of the part.
        scale: the factor of each delta, shape ``(k,)``, or None.
        density: the fraction of the elements that is kept, the largest ones.
        normalize: the divisor n: "weights" is sum_i agree_i w_i, as in mergekit; "count" is
            sum_i agree_i, the paper's disjoint mean; "none" is 1, its disjoint sum.
        scope: "tensor" keeps this fraction of each tensor, of equal elements the first ones, as
            mergekit does; "global" of the model as a whole, and all that equal the smallest of
            them, as the authors do: in bfloat16 many are equal.
        count: for scope "global", what the density is a fraction of: "all" elements, frozen ones,
            too, as the authors count, who keep ``int(density n) + 1``; or the "changed" ones.
        rescale: "l1" restores the sum of magnitudes of each delta, as mergekit does; "none"
            leaves it smaller.
    """
    return consensus(
        _trim(deltas, largest, start), weights, scale=scale, elect=True, normalize=normalize
    )


@chunks(largest=largest_elements)
def localize_and_stitch(
    deltas: torch.Tensor,
    weights: torch.Tensor,
    largest: list[Cutoff],
    start: int,
    *,
    density: float | Each = 0.05,
    scope: Scope = "global",
    count: Count = "changed",
) -> torch.Tensor:
    """Keep each task's largest elements, and average where several tasks have them (Localize).

        m_i = 1 at the largest elements of tau_i, else 0
        merged = sum_i w_i m_i tau_i / sum_i m_i

    Source: Localize-and-Stitch, arXiv 2408.13656. Its masks that are learned from labelled images
    are in the vectors of `localize` (`weightops vector --localize`), which ``density=1`` merges.

    Args:
        deltas: shape ``(k, n)``.
        weights: shape ``(k,)``.
        largest: the cutoff of each delta.
        start: the position of the part.
        density: the fraction of the elements that is kept; its authors take 0.05, and leave out the
            smallest of these.
        scope: "global" keeps this fraction of the model as a whole, and all that equal the smallest
            of them; "tensor" of each tensor.
        count: for scope "global", what the density is a fraction of: the "changed" elements, or
            "all" of them, as the authors count.
    """
    kept = _trim(deltas, largest, start)
    shares = flags(torch.ne, kept, 0)
    return divide_(add_rows(multiply_(kept, weights)), shares)
