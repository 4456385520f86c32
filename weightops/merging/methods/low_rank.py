"""Inputs that are kept as products of two matrices, such as LoRA, and results like them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from weightops.algebra.kernels import has_nonfinite
from weightops.algebra.linear_form import LinearForm
from weightops.algebra.source import Factors
from weightops.support.lazy import torch


def rank_of(forms: Sequence[LinearForm], name: str) -> int | None:
    """Return the columns that the factors of all forms have together; None if one has none."""
    ranks = [form.rank(name) for form in forms]
    return None if None in ranks else sum(rank or 0 for rank in ranks)


def nonfinite(factors: Sequence[Factors]) -> Factors | None:
    """Return factors of a result that is NaN if some of the given ones aren't finite, else None."""
    if not any(has_nonfinite(factor) for pair in factors for factor in pair):
        return None
    left, right = factors[0]
    return left.new_full((len(left), 1), math.nan), right.new_ones(1, right.shape[1])


def elements_of(
    factors: Factors, dtype: torch.dtype, device: torch.device
) -> Callable[[int, int], torch.Tensor]:
    """Return a function that returns elements ``start`` to ``stop`` of a product, flattened."""
    left, right = factors
    width = right.shape[1]

    def elements(start: int, stop: int) -> torch.Tensor:
        first, last = start // width, -(-stop // width)
        rows = (left[first:last] @ right).to(device, dtype)
        return rows.reshape(-1)[start - first * width : stop - first * width]

    return elements
