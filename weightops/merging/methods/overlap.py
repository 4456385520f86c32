"""Methods that treat elements that one input changes otherwise than those that several do: RAM."""

from __future__ import annotations

from weightops.algebra.kernels import add_rows
from weightops.errors import OptionError
from weightops.merging.methods.consensus import flags
from weightops.merging.methods.inputs import TensorInputs
from weightops.merging.methods.method import chunks
from weightops.support.lazy import torch


def _keep_changed_(deltas: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Set elements that an input changes by epsilon or less to 0, in place.

    Raises:
        OptionError: if epsilon is negative.
    """
    if epsilon < 0:
        raise OptionError(f"epsilon is a magnitude, and can't be {epsilon}")
    result: torch.Tensor = torch.hardshrink(deltas, epsilon, out=deltas)
    return result


def _flags_(kept: torch.Tensor) -> torch.Tensor:
    """Replace elements by 1 where they aren't 0, in place."""
    return kept.sign_().abs_()


@chunks()
def ram(deltas: torch.Tensor, *, epsilon: float = 1e-5) -> torch.Tensor:
    """Average what several inputs change, and keep whole what one changes (RAM).

        changes_i = 1 where |tau_i| > epsilon, else 0
        merged = sum_i changes_i tau_i / sum_i changes_i

    Source: arXiv 2601.13572.

    Args:
        deltas: shape ``(k, n)``.
        epsilon: the magnitude up to which an element counts as unchanged.
    """
    total = add_rows(_keep_changed_(deltas, epsilon))
    return total.div_(add_rows(_flags_(deltas)).clamp_(min=1))


def boosts_of_own_elements(
    inputs: TensorInputs, r: float, limit: float, epsilon: float
) -> torch.Tensor:
    """Return the factor of the elements that each input alone changes, shape ``(k,)``."""
    shared, own = (torch.zeros(inputs.k, dtype=torch.float64) for _ in range(2))
    for chunk in inputs:
        changes = _flags_(_keep_changed_(chunk.values, epsilon))
        alone = flags(torch.eq, add_rows(changes), 1)
        owned = (changes * alone).sum(1, dtype=torch.float64).cpu()
        own += owned
        shared += changes.sum(1, dtype=torch.float64).cpu() - owned
    ratio = shared / own.clamp(min=max(epsilon, torch.finfo(own.dtype).tiny))
    return (1 + r * ratio.clamp(0, limit)).to(inputs.device, inputs.dtype)


@chunks(boosts=boosts_of_own_elements)
def ramplus_tl(
    deltas: torch.Tensor,
    boosts: torch.Tensor,
    *,
    r: float = 0.1,
    limit: float = 0.2,
    epsilon: float = 1e-5,
) -> torch.Tensor:
    """Average what several inputs change, and strengthen what one changes (RAM+, tensor-local).

        changes_i = 1 where |tau_i| > epsilon, else 0, and n = sum_i changes_i
        boost_i = 1 + r min(shared_i / own_i, limit)
        merged = sum_i changes_i tau_i / n, times boost_i where n = 1

    own_i and shared_i count the elements of the tensor that input i changes alone, and with others.

    Source: arXiv 2601.13572; over each tensor, as in mergekit.

    Args:
        deltas: shape ``(k, n)``.
        boosts: the factor of the elements that each input alone changes, shape ``(k,)``.
        r: the strength of the boost.
        limit: the largest ratio of shared to own elements that counts, mergekit's alpha.
        epsilon: the magnitude up to which an element counts as unchanged.
    """
    kept = _keep_changed_(deltas, epsilon)
    total, boosted = add_rows(kept), torch.mv(kept.T, boosts - 1)
    counts = add_rows(_flags_(kept))
    alone = flags(torch.eq, counts, 1)
    return total.div_(counts.clamp_(min=1)).add_(alone.mul_(boosted))
