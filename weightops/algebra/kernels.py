"""Tensor arithmetic on flat chunks: accumulate in float32 (float64 for float64), round once.

Each element's result depends on that element alone: not on where a chunk begins, nor on how many threads there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from weightops.algebra.dtypes import accumulator
from weightops.errors import OptionError

CHUNK = 1 << 19
"""Elements of a chunk on CPU, where a result takes several passes: few enough to stay in the cache, enough to keep threads busy."""


PINNED = 4
"""Buffers of a thread by which tensors go to CUDA."""


def span(k: int) -> int:
    """Elements of each of ``k`` tensors that are worked on together."""
    return max(CHUNK >> (k - 1).bit_length(), 1 << 12)


def pick_device(device: str) -> torch.device:
    """``auto`` is CUDA where there is one, else CPU.

    Raises:
        OptionError: if there is no such device.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise OptionError(
            f"there is no device {device!r} here: {str(error).splitlines()[0]}"
        ) from error
    return torch.device(device)


class Scratch:
    """Buffers of one thread, reused from chunk to chunk.

    Args:
        device: where to compute.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self._buffers: dict[tuple[int, torch.dtype, torch.device], torch.Tensor] = {}
        self._within: dict[object, Scratch] = {}
        self._pinned: list[tuple[torch.Tensor, torch.cuda.Event]] = []
        self._turn = 0

    def within(self, owner: object) -> Scratch:
        """Other buffers, for what is computed on the way; the same for the same owner."""
        if owner not in self._within:
            self._within[owner] = Scratch(self.device)
        return self._within[owner]

    def get(
        self, slot: int, numel: int, dtype: torch.dtype, device: torch.device | None = None
    ) -> torch.Tensor:
        """A flat buffer; the same memory for the same slot, dtype and device."""
        key = (slot, dtype, device or self.device)
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < numel:
            room = (
                numel if buffer is None else 1 << (numel - 1).bit_length()
            )  # once it grows, it is used again
            buffer = self._buffers[key] = torch.empty(room, dtype=dtype, device=key[2])
        return buffer[:numel]

    def sent(self, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        """A flat tensor on a device. To CUDA it goes by pinned buffers in turn: while one is copied and computed with, the next is read."""
        if tensor.device == device:
            return tensor
        if device.type != "cuda" or tensor.device.type != "cpu":
            return tensor.to(device)
        if len(self._pinned) < PINNED:
            self._pinned.append((torch.empty(0, dtype=torch.uint8), torch.cuda.Event()))  # type: ignore[no-untyped-call]
        self._turn = (self._turn + 1) % len(self._pinned)
        buffer, arrived = self._pinned[self._turn]
        arrived.synchronize()  # what it held before
        if len(buffer) < tensor.nbytes:
            buffer = torch.empty(tensor.nbytes, dtype=torch.uint8, pin_memory=True)
            self._pinned[self._turn] = buffer, arrived
        there = (
            buffer[: tensor.nbytes].view(tensor.dtype).copy_(tensor).to(device, non_blocking=True)
        )
        arrived.record(torch.cuda.current_stream(device))
        return there


class Term(NamedTuple):
    """A tensor with its coefficient; ``relative`` ones are taken as their difference from the anchor."""

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
    r"""Write :math:`[a +] \sum_i c_i (x_i - a) + \sum_j c_j d_j` to ``out``; all tensors are flat and equally long.

    Taking differences from an anchor ``a`` keeps what is equal in all tensors as it is (infinities where all elements are equal).

    Args:
        out: where the result goes, rounded once to its dtype.
        anchor: what relative terms are taken from; None where there are none.
        terms: the rest.
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
    step = CHUNK * torch.get_num_threads() if out.device.type == "cpu" else out.numel()
    for start in range(0, out.numel(), step):
        stop = start + step
        parts = [term._replace(tensor=term.tensor[start:stop]) for term in terms]
        _accumulate(
            out[start:stop],
            anchor[start:stop] if anchor is not None else None,
            parts,
            keep_anchor,
            scratch,
        )


def _accumulate(
    out: torch.Tensor,
    anchor: torch.Tensor | None,
    terms: Sequence[Term],
    keep_anchor: bool,
    scratch: Scratch,
) -> None:
    working = (
        torch.float64
        if any(t.tensor.dtype == torch.float64 for t in terms)
        else accumulator(out.dtype)
    )
    total = out if out.dtype == working else scratch.get(0, out.numel(), working, out.device)
    origin = widen(anchor, working, 1, scratch) if anchor is not None else None
    if (
        keep_anchor
        and origin is not None
        and total is not out
        and all(t.relative and t.coefficient > 0 for t in terms)
    ):
        out.copy_(_towards_mean(origin, terms, total, scratch))
        return
    for i, (coefficient, tensor, relative) in enumerate(terms):
        term = widen(tensor, working, 2, scratch)
        if relative and origin is not None:
            alone = not i and coefficient == 1
            term = torch.sub(
                term,
                origin,
                out=total if alone else scratch.get(2, out.numel(), working, out.device),
            )
        if i:
            total.add_(term, alpha=coefficient)
        elif term is not total:
            torch.mul(term, coefficient, out=total)
    if not terms:
        total.zero_()
    if keep_anchor and origin is not None:
        total.add_(origin)
    if total is not out:
        out.copy_(total)


def _towards_mean(
    origin: torch.Tensor, terms: Sequence[Term], total: torch.Tensor, scratch: Scratch
) -> torch.Tensor:
    """The same in fewer passes, from the origin towards the terms' mean; precise to the size of the weights, for results that are narrower."""
    mean, weight = origin, 0.0
    for coefficient, tensor, _ in terms:
        weight += coefficient
        if mean is origin:
            mean = total.copy_(tensor)
        else:
            mean.lerp_(widen(tensor, total.dtype, 2, scratch), coefficient / weight)
    return torch.lerp(origin, mean, weight, out=total)


def widen(tensor: torch.Tensor, dtype: torch.dtype, slot: int, scratch: Scratch) -> torch.Tensor:
    """A tensor in a dtype: itself, or in a buffer."""
    return (
        tensor
        if tensor.dtype == dtype
        else scratch.get(slot, tensor.numel(), dtype, tensor.device).copy_(tensor)
    )


def has_nonfinite(chunk: torch.Tensor) -> bool:
    """True if any element is NaN or infinite."""
    if not chunk.dtype.is_floating_point or not chunk.numel():
        return False
    extremes = torch.aminmax(
        chunk if chunk.dtype.itemsize > 1 else chunk.float()
    )  # NaN is both, where there is one
    return not bool(torch.isfinite(torch.stack(extremes)).all())
