"""Buffers that one thread reuses from chunk to chunk."""

from __future__ import annotations

from enum import Enum, auto

from weightops.support.lazy import torch

_PINNED_BUFFERS = 4
"""Pinned buffers of one thread, by which it copies tensors to CUDA."""


class Slot(Enum):
    """The purpose of a buffer. Buffers of different slots never share memory."""

    TOTAL = auto()
    """The sum of terms, in the working precision."""
    ORIGIN = auto()
    """The anchor, in the working precision."""
    TERM = auto()
    """One term, in the working precision."""
    SHARED = auto()
    """Tensors that several steps use, in the working precision; distinguished by an index."""
    RESULT = auto()
    """Elements of one result."""
    ROWS = auto()
    """Elements of several results, one row each."""


class Scratch:
    """The buffers of one thread.

    Args:
        device: where to compute.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self._buffers: dict[tuple[Slot, int, torch.dtype, torch.device], torch.Tensor] = {}
        self._nested: dict[object, Scratch] = {}
        self._pinned: list[tuple[torch.Tensor, torch.cuda.Event]] = []
        self._turn = 0

    def nested(self, owner: object) -> Scratch:
        """Return the buffers that `owner` computes its tensors in, the same at each call."""
        if owner not in self._nested:
            self._nested[owner] = Scratch(self.device)
        return self._nested[owner]

    def get(
        self,
        slot: Slot,
        numel: int,
        dtype: torch.dtype,
        device: torch.device | None = None,
        *,
        index: int = 0,
    ) -> torch.Tensor:
        """Return a flat buffer; calls with one slot, dtype, device and index share its memory."""
        key = (slot, index, dtype, device or self.device)
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < numel:
            # A buffer that grows once will grow again, so it gets some room to spare.
            capacity = numel if buffer is None else 1 << (numel - 1).bit_length()
            buffer = self._buffers[key] = torch.empty(capacity, dtype=dtype, device=key[-1])
        return buffer[:numel]

    def to_device(self, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        """Return a flat tensor on a device.

        Tensors go to CUDA by pinned buffers in turn, so that the next one is read while one is
        copied and computed with.
        """
        if tensor.device == device:
            return tensor
        if device.type != "cuda" or tensor.device.type != "cpu":
            return tensor.to(device)
        if len(self._pinned) < _PINNED_BUFFERS:
            self._pinned.append((torch.empty(0, dtype=torch.uint8), torch.cuda.Event()))  # type: ignore[no-untyped-call]
        self._turn = (self._turn + 1) % len(self._pinned)
        buffer, copied = self._pinned[self._turn]
        copied.synchronize()  # before the buffer is overwritten
        if len(buffer) < tensor.nbytes:
            buffer = torch.empty(tensor.nbytes, dtype=torch.uint8, pin_memory=True)
            self._pinned[self._turn] = buffer, copied
        pinned = buffer[: tensor.nbytes].view(tensor.dtype).copy_(tensor)
        moved = pinned.to(device, non_blocking=True)
        copied.record(torch.cuda.current_stream(device))
        return moved
