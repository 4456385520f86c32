"""A merge method's inputs at one tensor, chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from hashlib import sha256
from typing import NamedTuple

import numpy as np
import torch

from weightops.engine.run import Reader
from weightops.kernels import CHUNK

Draws = Callable[[int], np.random.Generator]
"""Gives the random generator of an input by its index; seeded from (seed, tensor name, index, place of the chunk)."""

_BLOCKS, _BLOCK = 32, 1024  # a sample is so many blocks of so many elements


class Chunk(NamedTuple):
    """The inputs' values from element ``start`` on: ``(k, n)``, or ``(k, rows, width)`` where rows are kept whole."""

    values: torch.Tensor
    start: int
    draws: Draws


class Parts:
    """The inputs at one tensor, as an iterable of chunks that can be gone through again. A chunk is overwritten by the next.

    Args:
        readers: of the inputs.
        shape: of the tensor.
        dtype: to read in.
        by_rows: don't cut rows (of a matrix with the first dimension as its height).
        seed: what draws depend on beside index and place.
    """

    def __init__(
        self, readers: Sequence[Reader], shape: tuple[int, ...], dtype: torch.dtype, *, by_rows: bool, seed: str
    ) -> None:
        self.readers, self.shape, self.dtype, self.seed = readers, shape, dtype, seed
        self.k = len(readers)
        self.numel = torch.Size(shape).numel()
        self.width = self.numel // shape[0] if by_rows and len(shape) > 1 and self.numel else max(self.numel, 1)
        self.by_rows = by_rows
        fit = max(CHUNK // (1 << (len(readers) - 1).bit_length()), 1 << 12)
        self.length = max(fit // self.width, 1) * self.width if by_rows else fit
        self._buffer = torch.empty(len(readers) * min(self.length, self.numel), dtype=dtype)

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
            digest = sha256(f"{self.seed}\0{i}\0{start}".encode()).digest()
            return np.random.Generator(np.random.SFC64(int.from_bytes(digest[:16], "little")))

        return Chunk(values, start, draws)

    def read(self, start: int, stop: int, buffer: torch.Tensor) -> torch.Tensor:
        """Elements of all inputs, shape ``(k, n)``, in a buffer."""
        rows = buffer[: len(self.readers) * (stop - start)].view(len(self.readers), stop - start)
        for read, row in zip(self.readers, rows, strict=True):
            read(start, stop, row)
        return rows

    def sample(self) -> torch.Tensor:
        """Evenly spaced blocks of all inputs, shape ``(k, m)``; everything where that isn't more."""
        if self.numel <= _BLOCKS * _BLOCK:
            return self.read(0, self.numel, torch.empty(len(self.readers) * self.numel, dtype=self.dtype))
        starts = np.linspace(0, self.numel - _BLOCK, _BLOCKS).astype(int).tolist()
        blocks = torch.empty(_BLOCKS, len(self.readers) * _BLOCK, dtype=self.dtype)
        return torch.cat([self.read(a, a + _BLOCK, b) for a, b in zip(starts, blocks, strict=True)], dim=1)
