"""A merge method's inputs at one tensor, chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from hashlib import sha256
from itertools import accumulate
from threading import RLock
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from weightops.algebra.kernels import row_length
from weightops.algebra.scratch import Scratch, Slot
from weightops.engine.evaluate import Reader

Draws = Callable[[int], np.random.Generator]
"""Gives the random generator of an input by its index; seeded from (seed, tensor name, index, place of the chunk)."""

T = TypeVar("T")

_BLOCK = 1024  # a sample is blocks of so many elements: at least 32, and of large tensors a 256th


class Chunk(NamedTuple):
    """The inputs' values from element ``start`` on: ``(k, n)``, or ``(k, rows, width)`` where rows are kept whole."""

    values: torch.Tensor
    start: int
    draws: Draws


class TensorInputs:
    """The inputs at one tensor, as an iterable of chunks that can be gone through again. A chunk is overwritten by the next.

    Args:
        read: a reader of the inputs.
        k: how many inputs.
        shape: of the tensor.
        dtype: to read in.
        scratch: whose buffers to use.
        by_rows: don't cut rows (of a matrix with the first dimension as its height).
        seed: what draws depend on beside name, index and place.
        name: of the tensor.
    """

    def __init__(
        self,
        read: Reader,
        k: int,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        scratch: Scratch,
        *,
        by_rows: bool,
        seed: int,
        name: str,
    ) -> None:
        self._read, self.k, self.shape, self.dtype, self.seed, self.name = (
            read,
            k,
            shape,
            dtype,
            seed,
            name,
        )
        self.device = scratch.device
        self.numel = torch.Size(shape).numel()
        self.width = (
            self.numel // shape[0]
            if by_rows and len(shape) > 1 and self.numel
            else max(self.numel, 1)
        )
        self.by_rows = by_rows
        self.length = max(row_length(k) // self.width, 1) * self.width if by_rows else row_length(k)
        self._buffer = scratch.get(Slot.ROWS, k * min(self.length, self.numel), dtype)

    def __len__(self) -> int:
        return -(-self.numel // self.length)

    def __iter__(self) -> Iterator[Chunk]:
        return map(self.chunk, range(len(self)))

    def chunk(self, index: int) -> Chunk:
        """The ``index``-th chunk."""
        start = index * self.length
        values = self.read(start, min(start + self.length, self.numel), self._buffer)
        if self.by_rows:
            values = values.view(len(values), -1, self.width)

        def draws(i: int) -> np.random.Generator:
            digest = sha256(f"{self.seed}\0{self.name}\0{i}\0{start}".encode()).digest()
            return np.random.Generator(np.random.SFC64(int.from_bytes(digest[:16], "little")))

        return Chunk(values, start, draws)

    def read(self, start: int, stop: int, buffer: torch.Tensor) -> torch.Tensor:
        """Elements of all inputs, shape ``(k, n)``, in a buffer."""
        rows = buffer[: self.k * (stop - start)].view(self.k, stop - start)
        self._read(start, stop, rows.unbind())
        return rows

    def sample(self) -> torch.Tensor:
        """Evenly spaced blocks of all inputs, shape ``(k, m)``; everything where that isn't more."""
        blocks = max(32, self.numel // (256 * _BLOCK))
        if self.numel <= blocks * _BLOCK:
            return self.read(
                0,
                self.numel,
                torch.empty(self.k * self.numel, dtype=self.dtype, device=self.device),
            )
        starts = np.linspace(0, self.numel - _BLOCK, blocks).astype(int).tolist()
        buffers = torch.empty(blocks, self.k * _BLOCK, dtype=self.dtype, device=self.device)
        return torch.cat(
            [self.read(a, a + _BLOCK, b) for a, b in zip(starts, buffers, strict=True)], dim=1
        )


class ModelInputs:
    """The inputs' tensors end to end, as `TensorInputs` of one long tensor.

    Args:
        parts: of each tensor, opened anew, in given buffers.
        sizes: elements of each tensor.
        k: how many inputs.
    """

    def __init__(
        self, parts: Callable[[str, Scratch], TensorInputs], sizes: Mapping[str, int], k: int
    ) -> None:
        self._parts = parts
        ends = list(accumulate(sizes.values()))
        self.starts = dict(zip(sizes, [0, *ends], strict=False))
        self.numel = ends[-1] if ends else 0
        self.k = k
        self._lock, self._kept = RLock(), {}

    _kept: dict[Hashable, Any]

    def once(self, key: Hashable, compute: Callable[[], T]) -> T:
        """What is the same for all tensors, computed for the first that asks."""
        with self._lock:
            if key not in self._kept:
                self._kept[key] = compute()
            kept: T = self._kept[key]
            return kept

    def __iter__(self) -> Iterator[Chunk]:
        scratch = Scratch()
        for name, start in self.starts.items():
            for chunk in self._parts(name, scratch):
                yield chunk._replace(values=chunk.values.flatten(1), start=start + chunk.start)

    def sample(self) -> torch.Tensor:
        """Elements of all inputs, from each tensor by its size; shape ``(k, m)``.

        So many that they are about as many as those that they leave to be looked at: m^(3/2) = 4 n (see `_Bracket`).
        """
        found, most = [], max(65_536, round((4 * self.numel) ** (2 / 3)))
        for name in self.starts:
            part = self._parts(name, Scratch())
            few = part.sample()
            share = max(round(most * part.numel / self.numel), 8)
            found.append(
                few[:, np.linspace(0, few.shape[1] - 1, min(share, few.shape[1])).astype(int)]
            )
        return torch.cat(found, dim=1)
