"""Equality of tensors to the bit, and to units in the last place."""

from __future__ import annotations

import torch

State = dict[str, torch.Tensor]


def bits_equal(a: State, b: State) -> bool:
    """Return True if names, dtypes and values are equal."""
    return a.keys() == b.keys() and all(
        x.dtype == y.dtype and torch.equal(x, y)
        for x, y in zip(a.values(), b.values(), strict=True)
    )


def close(actual: torch.Tensor, exact: torch.Tensor, ulps: float = 1.0) -> bool:
    """Return True within some units in the last place of the result's dtype, at 1 or above."""
    eps = torch.finfo(actual.dtype).eps
    return bool(((actual.double() - exact).abs() <= ulps * eps * exact.abs().clamp(min=1.0)).all())
