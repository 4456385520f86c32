"""Combine flat tensors: add up in float32 (float64 for float64), round once.

An element of a result depends only on this element of the inputs: not on where a piece of a tensor
begins, nor on the number of threads.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import NamedTuple

from weightops.algebra.dtypes import accumulator
from weightops.algebra.scratch import Scratch, Slot
from weightops.support.lazy import torch

CHUNK = 1 << 19
"""Elements that a method takes at once, of all its inputs together."""

PIECE = 1 << 18
"""Elements that one thread combines at once on CPU: few enough that they stay in its cache from the
read to the write."""


def row_length(k: int) -> int:
    """Return how many elements of each of ``k`` tensors are processed together."""
    return max(CHUNK >> (k - 1).bit_length(), 1 << 12)


class Term(NamedTuple):
    """A tensor and its coefficient. A relative term counts by its difference from the anchor."""

    coefficient: float
    tensor: torch.Tensor
    relative: bool


def combine(
    out: torch.Tensor,
    anchor: torch.Tensor | None,
    terms: Sequence[Term],
    keep_anchor: bool,
    scratch: Scratch,
) -> None:
    """Write ``[a +] sum_i c_i (x_i - a) + sum_j c_j d_j`` to ``out``, where ``a`` is the anchor.

    Elements that are equal in all tensors are kept exactly, as their differences from the anchor
    are zero; so are infinities in a tensor that equals the anchor everywhere. All tensors are flat
    and of one length.

    Args:
        out: receives the result, rounded once to its dtype.
        anchor: the tensor that relative terms are differences from; None if there are none.
        terms: the relative terms ``(c_i, x_i)`` and the others ``(c_j, d_j)``.
        keep_anchor: add the anchor itself: the result is weights, not a delta.
        scratch: the thread's buffers.
    """
    if keep_anchor and anchor is not None:
        if all(term.relative and torch.equal(term.tensor, anchor) for term in terms):
            out.copy_(anchor)
            return
        if (
            len(terms) == 1
            and terms[0].relative
            and terms[0].tensor.dtype == anchor.dtype == out.dtype
        ):
            torch.lerp(anchor, terms[0].tensor, terms[0].coefficient, out=out)
            return
    any_float64 = any(term.tensor.dtype == torch.float64 for term in terms)
    working = torch.float64 if any_float64 else accumulator(out.dtype)
    size = out.numel()
    total = out if out.dtype == working else scratch.get(Slot.TOTAL, size, working, out.device)
    origin = None if anchor is None else widen(anchor, working, scratch, Slot.ORIGIN)
    if (
        keep_anchor
        and origin is not None
        and total is not out
        and all(term.relative and term.coefficient > 0 for term in terms)
    ):
        out.copy_(_move_towards_mean(origin, terms, total, scratch))
        return
    added = origin if keep_anchor else None
    for i, (coefficient, tensor, relative) in enumerate(terms):
        is_total = relative and origin is not None and i == 0 and coefficient == 1
        if is_total and tensor.dtype != working:
            term = total.copy_(tensor)
        else:
            term = widen(tensor, working, scratch, Slot.TERM)
        if relative and origin is not None:
            difference = total if is_total else scratch.get(Slot.TERM, size, working, out.device)
            term = torch.sub(term, origin, out=difference)
        if i:
            total.add_(term, alpha=coefficient)
        elif term is not total and coefficient == 1 and len(terms) == 1 and added is not None:
            torch.add(term, added, out=total)
            added = None
        elif term is not total:
            torch.mul(term, coefficient, out=total)
    if not terms:
        total.zero_()
    if added is not None:
        total.add_(added)
    if total is not out:
        out.copy_(total)


def keep_equal(
    out: torch.Tensor, anchor: torch.Tensor, terms: Sequence[Term], lengths: Iterable[int]
) -> None:
    """Copy from the anchor the parts that are equal in all tensors, as `combine` copies the whole.

    Args:
        out: the result of `combine`.
        anchor: its anchor.
        terms: its terms.
        lengths: the lengths of the parts, which follow each other.
    """
    if not all(term.relative for term in terms):
        return
    ends = list(accumulate(lengths))
    starts = torch.tensor([0, *ends[:-1]], device=out.device)
    first = anchor[starts]
    alike = torch.ones_like(first, dtype=torch.bool)
    for term in terms:  # few parts that differ begin with the same number
        alike &= term.tensor[starts] == first
    for i in alike.nonzero().flatten().tolist():
        part = slice(ends[i - 1] if i else 0, ends[i])
        if all(torch.equal(term.tensor[part], anchor[part]) for term in terms):
            out[part] = anchor[part]


def _move_towards_mean(
    origin: torch.Tensor, terms: Sequence[Term], total: torch.Tensor, scratch: Scratch
) -> torch.Tensor:
    """Write ``a + sum_i c_i (x_i - a)`` to ``total`` in fewer passes: from ``a`` towards the mean.

    The error is as large as a rounding of the weights, which a narrower result doesn't show.
    """
    mean, weight = origin, 0.0
    for coefficient, tensor, _ in terms:
        weight += coefficient
        if mean is origin:
            mean = total.copy_(tensor)
        else:
            wide = widen(tensor, total.dtype, scratch, Slot.TERM)
            mean.lerp_(wide, coefficient / weight)
    return torch.lerp(origin, mean, weight, out=total)


def widen(
    tensor: torch.Tensor, dtype: torch.dtype, scratch: Scratch, slot: Slot, *, index: int = 0
) -> torch.Tensor:
    """Return the tensor if it has this dtype already, else its values in a buffer of that dtype."""
    if tensor.dtype == dtype:
        return tensor
    return scratch.get(slot, tensor.numel(), dtype, tensor.device, index=index).copy_(tensor)


def has_nonfinite(chunk: torch.Tensor) -> bool:
    """Return True if any element is NaN or infinite."""
    has_none = "float4" in str(chunk.dtype) or not chunk.dtype.is_floating_point
    if has_none or not chunk.numel():
        return False
    wide = chunk if chunk.dtype.itemsize > 1 else chunk.float()  # float8 has no such kernels
    if bool(torch.isfinite(wide.sum())):
        return False  # one NaN or infinity stays in a sum, and adding up is the fastest test
    return not bool(torch.isfinite(torch.stack(torch.aminmax(wide))).all())


def add_rows(rows: torch.Tensor) -> torch.Tensor:
    """Return the sum of ``k`` rows, shape ``(k, ...)``; few are added faster one by one."""
    if not 1 < len(rows) <= 4:
        return rows.sum(0)
    result = rows[0] + 0.0  # as a sum that begins with 0: -0.0 becomes 0.0
    for row in rows[1:]:
        result += row
    return result


_COLUMNS = 256
"""Columns of a Gram matrix that are computed at a time."""


def add_gram(total: torch.Tensor, rows: torch.Tensor) -> None:
    """Add the sum of ``x x'`` over rows x to the lower triangle of a matrix, in place.

    What is above the diagonal isn't complete, which saves half of the time.
    """
    for start in range(0, rows.shape[1], _COLUMNS):
        stop = start + _COLUMNS
        total[start:, start:stop].addmm_(rows[:, start:].mT, rows[:, start:stop])
