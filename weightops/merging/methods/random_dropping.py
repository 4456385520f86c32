"""Methods that drop elements at random and rescale the rest: DARE and DELLA."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from weightops.algebra.names import Each
from weightops.errors import OptionError
from weightops.merging.methods.consensus import Divisor, Normalize, consensus, restoring_scale
from weightops.merging.methods.inputs import Draws, TensorInputs
from weightops.merging.methods.method import chunks
from weightops.merging.methods.option_values import fraction, per_input
from weightops.support.lazy import np, torch

Rescale = Literal["expectation", "l1", "none"]

_UNIT = 65_536
"""Probabilities are whole numbers of 65,536ths, which 16 random bits are compared with."""


def _drop(deltas: torch.Tensor, odds: Sequence[Any], draws: Draws) -> torch.Tensor:
    """Keep elements at random, the same ones at each call, and set the rest to 0, in place.

    Args:
        deltas: shape ``(k, ...)``.
        odds: for each delta the probability in 65,536ths that an element is kept, a number or an
            array of them.
        draws: the random generators.
    """
    # Of the deltas' own dtype, as products of two dtypes take three times as long.
    flags = torch.empty_like(deltas[0])
    for i, (delta, threshold) in enumerate(zip(deltas, odds, strict=True)):
        # Each 64 random bits are for four elements.
        bits = draws(i).bit_generator.random_raw(-(-delta.numel() // 4))
        chances = bits.view(np.uint16)[: delta.numel()].reshape(delta.shape)
        delta.mul_(flags.copy_(torch.from_numpy((chances < threshold).view(np.uint8))))
    return deltas


def _odds(density: float | Each, k: int) -> list[int]:
    """Return the density of each input in 65,536ths."""
    densities = per_input(density, k)
    odds = [round(fraction(value) * _UNIT) for value in densities]
    if any(rounded == 0 < value for rounded, value in zip(odds, densities, strict=True)):
        raise OptionError(
            f"a density of {min(densities):g} keeps nothing", hint="the least density is 1/65536"
        )
    return odds


def scale_after_dropping(
    inputs: TensorInputs, density: float | Each, rescale: Rescale
) -> torch.Tensor:
    """Return the factors of DARE's deltas, shape ``(k,)``."""
    odds = _odds(density, inputs.k)
    if rescale == "l1":
        return restoring_scale(inputs, lambda chunk: _drop(chunk.values, odds, chunk.draws))
    scale = [_UNIT / max(value, 1) if rescale == "expectation" else 1.0 for value in odds]
    return torch.tensor(scale, dtype=inputs.dtype).to(inputs.device)


@chunks(scale=scale_after_dropping)
def dare_linear(
    deltas: torch.Tensor,
    weights: torch.Tensor,
    draws: Draws,
    scale: torch.Tensor,
    *,
    density: float | Each = 0.2,
    rescale: Rescale = "expectation",
    normalize: Divisor = "none",
) -> torch.Tensor:
    """Drop elements at random, rescale the rest, and add the deltas (DARE).

        merged = sum_i w_i m_i tau_i / density, with m_i ~ Bernoulli(density)

    Source: arXiv 2311.03099.

    Args:
        deltas: shape ``(k, n)``.
        weights: shape ``(k,)``.
        draws: the random generators.
        scale: the factor of each delta, shape ``(k,)``.
        density: the probability that an element is kept.
        rescale: "expectation" divides by the density, as the paper does; "l1" restores the sum of
            magnitudes, as mergekit does; "none" does neither.
        normalize: "weights" divides by sum_i w_i, where that isn't 0.
    """
    kept = _drop(deltas, _odds(density, len(deltas)), draws)
    return consensus(kept, weights, scale=scale, elect=False, normalize=normalize)


@chunks(scale=scale_after_dropping)
def dare_ties(
    deltas: torch.Tensor,
    weights: torch.Tensor,
    draws: Draws,
    scale: torch.Tensor,
    *,
    density: float | Each = 0.2,
    rescale: Rescale = "expectation",
    normalize: Normalize = "none",
) -> torch.Tensor:
    """Drop elements at random, rescale, and add those of the elected signs (DARE with TIES).

        t_i = m_i tau_i / density, with m_i ~ Bernoulli(density)
        sign = sgn(sum_i w_i t_i)
        agree_i = 1 where w_i t_i sign > 0, else 0
        merged = sum_i agree_i w_i t_i / n

    Source: arXiv 2311.03099, and 2306.01708 for the election. The authors' code also trims what is
    left to its largest fifth, and takes the disjoint mean (``normalize="count"``).

    Args:
        deltas: shape ``(k, n)``.
        weights: shape ``(k,)``.
        draws: the random generators.
        scale: the factor of each delta, shape ``(k,)``.
        density: the probability that an element is kept.
        rescale: "expectation" divides by the density, as the paper does; "l1" restores the sum of
            magnitudes, as mergekit does; "none" does neither.
        normalize: the divisor n: "weights" is sum_i agree_i w_i, "count" is sum_i agree_i, "none"
            is 1.
    """
    kept = _drop(deltas, _odds(density, len(deltas)), draws)
    return consensus(kept, weights, scale=scale, elect=True, normalize=normalize)


def _ranks(rows: torch.Tensor) -> torch.Tensor:
    """Return the rank of each element's magnitude in its row, 0 for the smallest.

    Among equals the first has the lowest rank.
    """
    magnitudes, width = rows.abs(), rows.shape[-1]
    if rows.dtype == torch.float64 or rows.device.type != "cpu":
        order = magnitudes.argsort(dim=-1, stable=True)
    else:  # integers of magnitude and position sort faster than positions by magnitude
        keys = magnitudes.numpy().view(np.uint32).astype(np.uint64)
        keys <<= np.uint64(32)
        keys |= np.arange(width, dtype=np.uint64)
        keys.sort(axis=-1)
        order = torch.from_numpy(keys.view(np.int64)).bitwise_and_(0xFFFFFFFF)
    ranks = torch.arange(width, dtype=rows.dtype, device=rows.device)
    return magnitudes.scatter_(-1, order, ranks.expand_as(rows))


def _drop_by_rank(
    deltas: torch.Tensor,
    density: float | Each,
    epsilon: float | Each,
    draws: Draws,
    rescale: Rescale,
) -> torch.Tensor:
    """Keep elements at random, with probabilities that rise with the rank of their magnitude.

    In each row the probabilities go from ``density - epsilon`` to ``density + epsilon``.
    """
    k, width = len(deltas), deltas.shape[-1]
    odds = _ranks(deltas).mul_(2 / (width - 1)).sub_(1) if width > 1 else torch.zeros_like(deltas)
    for row, d, e in zip(odds, per_input(density, k), per_input(epsilon, k), strict=True):
        reach = e if 0 < fraction(d) < 1 else 0.0  # at 0 and 1 no element is left to chance
        if not 0 <= d - reach <= d + reach <= 1:
            raise OptionError(
                f"density {d:g} with epsilon {e:g} gives probabilities outside of 0 to 1"
            )
        row.mul_(reach).add_(d).clamp_(0, 1).mul_(_UNIT).round_()
    _drop(deltas, [row.to(torch.int32).cpu().numpy() for row in odds], draws)
    return deltas.div_(odds.clamp_(min=1).div_(_UNIT)) if rescale == "expectation" else deltas


def scale_after_dropping_by_rank(
    inputs: TensorInputs, density: float | Each, epsilon: float | Each, rescale: Rescale
) -> torch.Tensor:
    """Return the factors of DELLA's deltas, shape ``(k,)``: not 1 only for ``rescale="l1"``."""
    if rescale != "l1":
        return torch.ones(inputs.k, dtype=inputs.dtype, device=inputs.device)
    return restoring_scale(
        inputs, lambda chunk: _drop_by_rank(chunk.values, density, epsilon, chunk.draws, rescale)
    )


@chunks(scale=scale_after_dropping_by_rank, by_rows=True)
def della_linear(
    deltas: torch.Tensor,
    weights: torch.Tensor,
    draws: Draws,
    scale: torch.Tensor,
    *,
    density: float | Each = 0.5,
    epsilon: float | Each = 0.1,
    rescale: Rescale = "expectation",
    normalize: Divisor = "none",
) -> torch.Tensor:
    """Drop elements at random by magnitude, rescale, and add the deltas (DELLA without election).

        merged = sum_i w_i m_i tau_i / p_i, with m_i ~ Bernoulli(p_i)
        p_i = density + epsilon (2 r_i / (n - 1) - 1)

    r_i is the rank of an element's magnitude in its row of n, 0 for the smallest.

    Source: arXiv 2406.11617.

    Args:
        deltas: shape ``(k, rows, width)``.
        weights: shape ``(k,)``.
        draws: the random generators.
        scale: the factor of each delta, shape ``(k,)``.
        density: the mean probability that an element is kept.
        epsilon: how far the probabilities reach to either side of the density.
        rescale: "expectation" divides by the probabilities, as the paper does; "l1" restores the
            sum of magnitudes, as mergekit does; "none" does neither.
        normalize: "weights" divides by sum_i w_i, where that isn't 0.
    """
    kept = _drop_by_rank(deltas, density, epsilon, draws, rescale)
    return consensus(kept, weights, scale=scale, elect=False, normalize=normalize)


@chunks(scale=scale_after_dropping_by_rank, by_rows=True)
def della(
    deltas: torch.Tensor,
    weights: torch.Tensor,
    draws: Draws,
    scale: torch.Tensor,
    *,
    density: float | Each = 0.5,
    epsilon: float | Each = 0.1,
    rescale: Rescale = "expectation",
    normalize: Normalize = "none",
) -> torch.Tensor:
    """Drop elements at random by magnitude, and add those of the elected signs (DELLA).

        t_i = m_i tau_i / p_i, with m_i and p_i as in della_linear
        sign = sgn(sum_i w_i t_i)
        agree_i = 1 where w_i t_i sign > 0, else 0
        merged = sum_i agree_i w_i t_i / n

    Source: arXiv 2406.11617. Its authors normalise by the weights (``normalize="weights"``).

    Args:
        deltas: shape ``(k, rows, width)``.
        weights: shape ``(k,)``.
        draws: the random generators.
        scale: the factor of each delta, shape ``(k,)``.
        density: the mean probability that an element is kept.
        epsilon: how far the probabilities reach to either side of the density, by the rank of
            magnitude in a row: all elements at one index of the first dimension.
        rescale: "expectation" divides by the probabilities, as the paper does; "l1" restores the
            sum of magnitudes, as mergekit does; "none" does neither.
        normalize: the divisor n: "weights" is sum_i agree_i w_i, "count" is sum_i agree_i, "none"
            is 1.
    """
    kept = _drop_by_rank(deltas, density, epsilon, draws, rescale)
    return consensus(kept, weights, scale=scale, elect=True, normalize=normalize)
