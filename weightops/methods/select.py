"""Which elements of a tensor to keep: exact thresholds and masks."""

from __future__ import annotations

import torch

from weightops.errors import OptionError

_HIGH = 15  # the lower bits that the first of two counting passes leaves out


def kth_magnitude(tensor: torch.Tensor, k: int) -> torch.Tensor:
    """The k-th largest magnitude (k = 1: the largest), exactly, as a scalar of the tensor's dtype.

    For float32 the bit patterns of magnitudes are counted twice, by their upper and then by their lower bits: no
    sorting, two passes, memory for 65,536 counts.

    >>> kth_magnitude(torch.tensor([3.0, -1.0, 2.0, -5.0]), 2)
    tensor(3.)
    """
    flat = tensor.reshape(-1).abs()
    if flat.dtype != torch.float32:
        return flat.kthvalue(flat.numel() - k + 1).values
    bits = flat.view(torch.int32)
    upper = torch.bincount(bits >> _HIGH, minlength=1 << 16)
    from_top = upper.flip(0).cumsum(0)
    place = int(torch.searchsorted(from_top, k))
    bin_ = (1 << 16) - 1 - place
    left = k - (int(from_top[place - 1]) if place else 0)
    inside = bits[(bits >> _HIGH) == bin_] & ((1 << _HIGH) - 1)
    lower = torch.bincount(inside, minlength=1 << _HIGH).flip(0).cumsum(0)
    low = (1 << _HIGH) - 1 - int(torch.searchsorted(lower, left))
    return torch.tensor([(bin_ << _HIGH) | low], dtype=torch.int32, device=tensor.device).view(torch.float32)[0]


def fraction(value: float, what: str = "density") -> float:
    """A fraction, checked.

    Raises:
        OptionError: if it is outside [0, 1].
    """
    if not 0 <= value <= 1:
        raise OptionError(f"{what} is a fraction, from 0 to 1, not {value}")
    return value


def count(density: float, numel: int) -> int:
    """How many of ``numel`` elements a density keeps: the nearest whole number."""
    return round(fraction(density) * numel)


def largest(tensor: torch.Tensor, k: int) -> torch.Tensor:
    """A mask of exactly the k elements of largest magnitude; among equals the first count.

    >>> largest(torch.tensor([1.0, -3.0, 3.0, 2.0]), 2)
    tensor([False,  True,  True, False])
    """
    if k >= tensor.numel():
        return torch.ones_like(tensor, dtype=torch.bool)
    if k <= 0:
        return torch.zeros_like(tensor, dtype=torch.bool)
    threshold = kth_magnitude(tensor, k)
    magnitude = tensor.abs()
    keep = magnitude > threshold
    short = k - int(keep.sum())
    equal = magnitude == threshold
    if int(equal.sum()) > short:
        places = equal.reshape(-1).nonzero()[:short]
        equal = torch.zeros_like(equal).reshape(-1).index_fill_(0, places[:, 0], True).reshape(equal.shape)
    return keep | equal
