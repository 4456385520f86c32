r"""Sparsify, elect a sign, combine: TIES, DARE, Breadcrumbs, DELLA, magnitude trimming and SCE.

One definition, of which each method is a choice of parts. With sparsified deltas :math:`\hat\tau_i` and weights
:math:`w_i`, the elected sign is :math:`\gamma = \mathrm{sgn} \sum_i w_i \hat\tau_i` (that of zero is +), those that agree are
:math:`a_i = [w_i \hat\tau_i \gamma > 0]`, and the result is :math:`\sum_i a_i w_i \hat\tau_i / n` with
:math:`n = \sum_i a_i w_i` ("weights"), :math:`\sum_i a_i` ("count") or 1 ("none").
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch

from weightops.engine.reduce import sums
from weightops.errors import OptionError
from weightops.merging.methods.inputs import Chunk, Draws, ModelInputs, TensorInputs
from weightops.merging.methods.kept_elements import (
    ALL,
    NONE,
    Cutoff,
    count,
    cutoffs,
    each,
    fraction,
)
from weightops.merging.methods.method import chunks

Normalize = Literal["weights", "count", "none"]
Scope = Literal["tensor", "global"]
Rescale = Literal["expectation", "l1", "none"]


def consensus(
    deltas: torch.Tensor,
    weights: torch.Tensor,
    *,
    elect: bool,
    normalize: Normalize,
    scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Combine sparsified deltas of shape ``(k, ...)``, which it overwrites, multiplied by a scale each; without an election all agree."""
    _times(deltas, weights if scale is None else weights * scale)
    if not elect:
        return deltas.sum(0)
    sign = _elected(deltas)
    total = deltas.sum(0).mul_(sign)
    if normalize == "none":
        return total
    agree = _flags(torch.gt, deltas, 0, out=deltas)
    return _over(total, _times(agree, weights) if normalize == "weights" else agree)


def _times(values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Each of the values, shape ``(k, ...)``, multiplied by its weight in place."""
    return (
        values
        if bool((weights == 1).all())
        else values.mul_(weights.view(-1, *[1] * (values.ndim - 1)))
    )


def _elected(deltas: torch.Tensor) -> torch.Tensor:
    """The sign of the deltas' sum; makes the deltas the magnitudes of those elements that agree with it, and 0."""
    sign = _flags(torch.ge, deltas.sum(0), 0).mul_(2).sub_(1)
    deltas.mul_(sign).relu_()
    return sign


def _over(total: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """A total divided by the sum of shares of shape ``(k, ...)``, where that isn't 0."""
    divisor = shares.sum(0)
    return total.div_(divisor.add_(_flags(torch.eq, divisor, 0)))


def _flags(
    test: Callable[..., Any], values: torch.Tensor, other: float, out: torch.Tensor | None = None
) -> torch.Tensor:
    """1 where a test of values holds, 0 elsewhere, in their own dtype: far faster than booleans."""
    found: torch.Tensor = test(values, other, out=torch.empty_like(values) if out is None else out)
    return found


# ------------------------------------------------------------------ by magnitude


def _limits(
    parts: TensorInputs,
    vector: ModelInputs,
    scope: Scope,
    counts: Callable[[int, int], Sequence[int]],
) -> list[list[Cutoff]]:
    """Limits for each input, over the tensor, or over what each input changes in all tensors.

    ``counts`` gives the counts of an input from its index and how many elements there are to choose from.
    """
    if scope == "tensor":
        return cutoffs(parts, counts)
    start = vector.starts[parts.name]
    key = tuple(tuple(counts(i, 10**9)) for i in range(vector.k))
    every = vector.once(key, lambda: cutoffs(vector, counts, of_nonzero=True))
    return [[limit.after(start) for limit in row] for row in every]


def largest(parts: TensorInputs, vector: ModelInputs, density: float, scope: Scope) -> list[Cutoff]:
    """The limit of each input's largest elements, a fraction ``density`` of them."""
    densities = each(density, parts.k)
    return [
        limit for [limit] in _limits(parts, vector, scope, lambda i, n: [count(densities[i], n)])
    ]


def trim(deltas: torch.Tensor, largest: list[Cutoff], start: int) -> torch.Tensor:
    """Each delta with only its largest elements."""
    for delta, limit in zip(deltas, largest, strict=True):
        limit.keep(delta, start)
    return deltas


@chunks(largest)
def magnitude(
    deltas: torch.Tensor,
    weights: torch.Tensor,
    largest: list[Cutoff],
    start: int,
    *,
    density: float = 0.2,
    scope: Scope = "tensor",
) -> torch.Tensor:
    r"""Trim each delta to its largest elements, and add: :math:`\sum_i w_i\,\mathrm{trim}(\tau_i)` (the trimming of arXiv 2306.01708).

    Args:
        deltas: shape ``(k, n)``.
        weights: shape ``(k,)``.
        largest: what each delta keeps.
        start: place of the part.
        density: fraction kept.
        scope: choose over each "tensor", or "global"ly over what an input changes in all of them, as the authors of TIES do.
    """
    return consensus(trim(deltas, largest, start), weights, elect=False, normalize="none")


@chunks(largest)
def ties(
    deltas: torch.Tensor,
    weights: torch.Tensor,
    largest: list[Cutoff],
    start: int,
    *,
    density: float = 0.2,
    normalize: Normalize = "weights",
    scope: Scope = "tensor",
) -> torch.Tensor:
    r"""TIES: trim, elect sign, disjoint merge (arXiv 2306.01708).

    With trimmed deltas :math:`\hat\tau_i` and the elected sign :math:`\gamma = \mathrm{sgn} \sum_i w_i \hat\tau_i`, the result
    is :math:`\sum_{i:\,w_i \hat\tau_i \gamma > 0} w_i \hat\tau_i / n`.

    Args:
        deltas: shape ``(k, n)``.
        weights: shape ``(k,)``.
        largest: what each delta keeps.
        start: place of the part.
        density: fraction of each delta that is kept, the largest.
        normalize: "weights" divides by the weights of those that agree, as mergekit does; "count" by their number (the paper's
            disjoint mean); "none" doesn't (its disjoint sum).
        scope: choose over each "tensor", or "global"ly over what an input changes in all of them, as the authors of TIES do.
    """
    return consensus(trim(deltas, largest, start), weights, elect=True, normalize=normalize)


def outliers(
    parts: TensorInputs, vector: ModelInputs, density: float, gamma: float, scope: Scope
) -> list[list[Cutoff]]:
    """The limits between which each input's elements are neither the largest ``gamma`` nor the smallest."""
    densities, gammas = each(density, parts.k), each(gamma, parts.k)

    def counts(i: int, n: int) -> list[int]:
        keep = count(densities[i], n)
        top = min(int(fraction(gammas[i], "gamma") * n), n - keep)
        return [keep + top, top]

    return _limits(parts, vector, scope, counts)


def without_outliers(
    deltas: torch.Tensor, outliers: list[list[Cutoff]], start: int
) -> torch.Tensor:
    """Each delta without its largest and its smallest elements."""
    for delta, (lower, upper) in zip(deltas, outliers, strict=True):
        if upper != NONE:
            delta -= upper.keep(delta.clone(), start)
        lower.keep(delta, start)
    return deltas


@chunks(outliers)
def breadcrumbs(
    deltas: torch.Tensor,
    weights: torch.Tensor,
    outliers: list[list[Cutoff]],
    start: int,
    *,
    density: float = 0.9,
    gamma: float = 0.01,
    scope: Scope = "tensor",
) -> torch.Tensor:
    r"""Model breadcrumbs: drop the largest and the smallest elements, and add (arXiv 2312.06795).

    :math:`\sum_i w_i m_i \tau_i`, where :math:`m_i` is 0 for the largest ``gamma`` of the elements and for all that come after
    the next ``density``.

    Args:
        deltas: shape ``(k, n)``.
        weights: shape ``(k,)``.
        outliers: what lies between the two.
        start: place of the part.
        density: fraction kept.
        gamma: fraction of largest elements that is dropped.
        scope: choose over each "tensor", or "global"ly over what an input changes in all of them, as the authors of TIES do.
    """
    return consensus(
        without_outliers(deltas, outliers, start), weights, elect=False, normalize="none"
    )


@chunks(outliers)
def breadcrumbs_ties(
    deltas: torch.Tensor,
    weights: torch.Tensor,
    outliers: list[list[Cutoff]],
    start: int,
    *,
    density: float = 0.9,
    gamma: float = 0.01,
    normalize: Normalize = "none",
    scope: Scope = "tensor",
) -> torch.Tensor:
    r"""Model breadcrumbs with TIES' election of signs (arXiv 2312.06795, 2306.01708).

    As `ties`, of deltas without their largest and smallest elements.

    Args:
        deltas: shape ``(k, n)``.
        weights: shape ``(k,)``.
        outliers: what lies between the two.
        start: place of the part.
        density: fraction kept.
        gamma: fraction of largest elements that is dropped.
        normalize: as in `ties`.
        scope: choose over each "tensor", or "global"ly over what an input changes in all of them, as the authors of TIES do.
    """
    return consensus(
        without_outliers(deltas, outliers, start), weights, elect=True, normalize=normalize
    )


# --------------------------------------------------------------------- at random


def _drop(deltas: torch.Tensor, odds: Sequence[Any], draws: Draws) -> torch.Tensor:
    """Keep elements with probabilities in 65,536ths, the same ones whenever it is asked; in place."""
    flags = torch.empty_like(
        deltas[0]
    )  # of the deltas' own dtype: products of two types take three times as long
    for i, (delta, limit) in enumerate(zip(deltas, odds, strict=True)):
        raw = draws(i).bit_generator.random_raw(
            -(-delta.numel() // 4)
        )  # each 64 bits for four elements
        chance = raw.view(np.uint16)[: delta.numel()].reshape(delta.shape)
        delta.mul_(flags.copy_(torch.from_numpy((chance < limit).view(np.uint8))))
    return deltas


def _odds(density: float, k: int) -> list[int]:
    odds = [round(fraction(value) * 65536) for value in each(density, k)]
    if any(n == 0 < value for n, value in zip(odds, each(density, k), strict=True)):
        raise OptionError(
            f"a density of {min(each(density, k)):g} keeps nothing: the least is 1/65536"
        )
    return odds


def _restored(parts: TensorInputs, sparsify: Callable[[Chunk], torch.Tensor]) -> torch.Tensor:
    """What brings each input's sum of magnitudes back to what it was; 1 where nothing is left. Shape ``(k,)``."""
    before, after = torch.zeros(2, parts.k, dtype=torch.float64)
    for chunk in parts:
        before += sums(chunk.values.flatten(1).abs())
        after += sums(sparsify(chunk).flatten(1).abs_())
    return torch.where(after > 0, before / after, 1.0).to(parts.device, parts.dtype)


def dare_scale(parts: TensorInputs, density: float, rescale: Rescale) -> torch.Tensor:
    """What each delta is multiplied by when most of it is dropped: shape ``(k,)``."""
    odds = _odds(density, parts.k)
    if rescale == "l1":
        return _restored(parts, lambda chunk: _drop(chunk.values, odds, chunk.draws))
    scale = [65536 / max(n, 1) if rescale == "expectation" else 1.0 for n in odds]
    return torch.tensor(scale, dtype=parts.dtype).to(parts.device)


@chunks(dare_scale)
def dare_linear(
    deltas: torch.Tensor,
    weights: torch.Tensor,
    draws: Draws,
    dare_scale: torch.Tensor,
    *,
    density: float = 0.2,
    rescale: Rescale = "expectation",
) -> torch.Tensor:
    r"""DARE: drop elements at random and rescale the rest, then add (arXiv 2311.03099).

    :math:`\sum_i w_i m_i \tau_i / p` with :math:`m_i \sim \mathrm{Bernoulli}(p)` and :math:`p` the density.

    Args:
        deltas: shape ``(k, n)``.
        weights: shape ``(k,)``.
        draws: random generators.
        dare_scale: shape ``(k,)``.
        density: the probability that an element is kept.
        rescale: "expectation" divides by the density, as the paper does; "l1" restores the sum of magnitudes, as mergekit does.
    """
    kept = _drop(deltas, _odds(density, len(deltas)), draws)
    return consensus(kept, weights, scale=dare_scale, elect=False, normalize="none")


@chunks(dare_scale)
def dare_ties(
    deltas: torch.Tensor,
    weights: torch.Tensor,
    draws: Draws,
    dare_scale: torch.Tensor,
    *,
    density: float = 0.2,
    rescale: Rescale = "expectation",
    normalize: Normalize = "none",
) -> torch.Tensor:
    r"""DARE, then TIES' election of signs (arXiv 2311.03099, 2306.01708).

    As `ties`, of :math:`m_i \tau_i / p` with :math:`m_i \sim \mathrm{Bernoulli}(p)` and :math:`p` the density.

    Args:
        deltas: shape ``(k, n)``.
        weights: shape ``(k,)``.
        draws: random generators.
        dare_scale: shape ``(k,)``.
        density: the probability that an element is kept.
        rescale: as in `dare_linear`.
        normalize: as in `ties`.
    """
    kept = _drop(deltas, _odds(density, len(deltas)), draws)
    return consensus(kept, weights, scale=dare_scale, elect=True, normalize=normalize)


def _ranks(rows: torch.Tensor) -> torch.Tensor:
    """The rank of each element's magnitude in its row, 0 for the smallest; among equals the first is smaller."""
    magnitudes, width = rows.abs(), rows.shape[-1]
    if rows.dtype == torch.float64 or rows.device.type != "cpu":
        order = magnitudes.argsort(dim=-1, stable=True)
    else:  # one integer of magnitude and place sorts faster than places by magnitude
        keys = magnitudes.numpy().view(np.uint32).astype(np.uint64)
        keys <<= np.uint64(32)
        keys |= np.arange(width, dtype=np.uint64)
        keys.sort(axis=-1)
        order = torch.from_numpy(keys.view(np.int64)).bitwise_and_(0xFFFFFFFF)
    return magnitudes.scatter_(
        -1, order, torch.arange(width, dtype=rows.dtype, device=rows.device).expand_as(rows)
    )


def _magprune(
    deltas: torch.Tensor, density: float, epsilon: float, draws: Draws, rescale: Rescale
) -> torch.Tensor:
    """Keep elements with probabilities that rise with the rank of their magnitude in their row, from density - epsilon to + epsilon."""
    width = deltas.shape[-1]
    middle = _ranks(deltas).mul_(2 / (width - 1)).sub_(1) if width > 1 else torch.zeros_like(deltas)
    for row, d, e in zip(
        middle, each(density, len(deltas)), each(epsilon, len(deltas)), strict=True
    ):
        reach = e if 0 < fraction(d) < 1 else 0.0  # all are kept, or none
        if not 0 <= d - reach <= d + reach <= 1:
            raise OptionError(
                f"density {d:g} with epsilon {e:g} gives probabilities outside of 0 to 1"
            )
        row.mul_(reach).add_(d).clamp_(0, 1).mul_(65536).round_()
    _drop(deltas, [row.to(torch.int32).cpu().numpy() for row in middle], draws)
    return deltas.div_(middle.clamp_(min=1).div_(65536)) if rescale == "expectation" else deltas


def della_scale(
    parts: TensorInputs, density: float, epsilon: float, rescale: Rescale
) -> torch.Tensor:
    """What restores each delta's sum of magnitudes, where that is asked for: shape ``(k,)``."""
    if rescale != "l1":
        return torch.ones(parts.k, dtype=parts.dtype, device=parts.device)
    return _restored(
        parts, lambda chunk: _magprune(chunk.values, density, epsilon, chunk.draws, rescale)
    )


@chunks(della_scale, by_rows=True)
def della_linear(
    deltas: torch.Tensor,
    weights: torch.Tensor,
    draws: Draws,
    della_scale: torch.Tensor,
    *,
    density: float = 0.5,
    epsilon: float = 0.1,
    rescale: Rescale = "expectation",
) -> torch.Tensor:
    r"""DELLA without election: drop at random, the small ones rather than the large, and add (arXiv 2406.11617).

    :math:`\sum_i w_i m_i \tau_i / p_i` with :math:`m_i \sim \mathrm{Bernoulli}(p_i)` and
    :math:`p_i = \mathrm{density} + \epsilon (2 r_i / (n - 1) - 1)`, :math:`r_i` the rank of the magnitude in its row of n.

    Args:
        deltas: shape ``(k, rows, width)``.
        weights: shape ``(k,)``.
        draws: random generators.
        della_scale: shape ``(k,)``.
        density: the mean probability that an element is kept.
        epsilon: how far the probabilities reach to either side of it, by rank of magnitude within a row.
        rescale: as in `dare_linear`.
    """
    kept = _magprune(deltas, density, epsilon, draws, rescale)
    return consensus(kept, weights, scale=della_scale, elect=False, normalize="none")


@chunks(della_scale, by_rows=True)
def della(
    deltas: torch.Tensor,
    weights: torch.Tensor,
    draws: Draws,
    della_scale: torch.Tensor,
    *,
    density: float = 0.5,
    epsilon: float = 0.1,
    rescale: Rescale = "expectation",
    normalize: Normalize = "none",
) -> torch.Tensor:
    r"""DELLA: drop by magnitude at random, elect sign, fuse (arXiv 2406.11617).

    As `ties`, of :math:`m_i \tau_i / p_i` as in `della_linear`.

    Args:
        deltas: shape ``(k, rows, width)``.
        weights: shape ``(k,)``.
        draws: random generators.
        della_scale: shape ``(k,)``.
        density: the mean probability that an element is kept.
        epsilon: how far the probabilities reach to either side of it, by rank of magnitude within a row.
        rescale: as in `dare_linear`.
        normalize: as in `ties`.
    """
    kept = _magprune(deltas, density, epsilon, draws, rescale)
    return consensus(kept, weights, scale=della_scale, elect=True, normalize=normalize)


# ------------------------------------------------------------ by what all inputs do


def _variance(values: torch.Tensor) -> torch.Tensor:
    centred = values - values.sum(0).div_(len(values))
    return centred.square_().sum(0, keepdim=True).div_(len(values))


def selected(parts: TensorInputs, select_topk: float) -> Cutoff:
    """The limit of the elements whose variance over the inputs is largest, a fraction of those that vary at all."""
    share = fraction(select_topk, "select_topk")
    [[limit]] = (
        [[ALL]]
        if share == 1
        else cutoffs(parts, lambda _, n: [int(share * n)], _variance, of_nonzero=True)
    )
    return limit


def _select(deltas: torch.Tensor, selected: Cutoff, start: int) -> torch.Tensor:
    return deltas if selected == ALL else deltas.mul_(selected.flags(_variance(deltas)[0], start))


def energy(parts: TensorInputs, selected: Cutoff) -> torch.Tensor:
    """Each input's share of the squares of what is selected; equal shares where all are zero. Shape ``(k,)``."""
    squares = torch.zeros(parts.k, dtype=torch.float64)
    for chunk in parts:
        squares += sums(_select(chunk.values, selected, chunk.start).square_())
    total = squares.sum()
    shares = squares / total if total > 0 else torch.full_like(squares, 1 / len(squares))
    return shares.to(parts.device, parts.dtype)


@chunks(selected, energy)
def sce(
    deltas: torch.Tensor,
    selected: Cutoff,
    energy: torch.Tensor,
    start: int,
    *,
    select_topk: float = 1.0,
) -> torch.Tensor:
    r"""SCE: select the elements that vary most, calculate weights from energy, erase minority signs (arXiv 2408.07990).

    Args:
        deltas: shape ``(k, n)``.
        selected: which elements are kept.
        energy: the weights, shape ``(k,)``.
        start: place of the part.
        select_topk: fraction kept of the elements that vary over the inputs, by their variance.
    """
    kept = _select(deltas, selected, start)
    sign = _elected(kept)
    shares = _times(_flags(torch.gt, kept, 0), energy)
    return _over(_times(kept, energy).sum(0).mul_(sign), shares)


@chunks()
def tall_consensus(
    deltas: torch.Tensor, *, mask_scale: float = 0.4, agreement: int = 2
) -> torch.Tensor:
    r"""Consensus merging with TALL masks: :math:`\tau\,[\sum_i m_i \ge a]`, :math:`m_i = |\tau_i| \ge \lambda|\tau - \tau_i|` (arXiv 2405.07813).

    Args:
        deltas: shape ``(k, n)``; :math:`\tau` is their sum.
        mask_scale: :math:`\lambda`.
        agreement: how many inputs must need an element for it to be kept.
    """
    total = deltas.sum(0)
    needs = deltas.abs() - mask_scale * (total - deltas).abs()
    return total * _flags(torch.ge, _flags(torch.ge, needs, 0).sum(0), agreement)
