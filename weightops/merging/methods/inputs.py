"""The inputs of a merge method: at one tensor, chunk by chunk, or at all tensors of the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Mapping
from hashlib import sha256
from itertools import accumulate
from threading import RLock
from typing import Any, NamedTuple, TypeAlias, TypeVar

from weightops.algebra.kernels import row_length
from weightops.algebra.scratch import Scratch, Slot
from weightops.engine.evaluate import Reader
from weightops.support.lazy import np, torch

Draws: TypeAlias = "Callable[[int], np.random.Generator]"
"""Gives the random generator of an input by its index, seeded from (seed, tensor name, index,
position of the chunk)."""

T = TypeVar("T")

_BLOCK = 1024
"""Elements of a block of a sample, which has at least 32 blocks, and a 256th of a large tensor."""


def sample_size(n: int) -> int:
    """Return the number m of elements in a sample of n.

    With m^(3/2) = 4 n, there are about as many in the sample as in the bracket that it gives
    (see `kept_elements.cutoffs`), so that their sum is smallest.
    """
    return max(65_536, round(math.pow(4 * n, 2 / 3)))


class Chunk(NamedTuple):
    """The inputs' values from element ``start`` on.

    Their shape is ``(k, n)``, or ``(k, rows, width)`` where rows aren't cut.
    """

    values: torch.Tensor
    start: int
    draws: Draws


class TensorInputs:
    """The inputs at one tensor, as an iterable of chunks; a chunk is overwritten by the next.

    Args:
        read: a reader of the inputs.
        k: the number of inputs.
        shape: the shape of the tensor.
        dtype: the dtype to read in.
        scratch: the buffers to use.
        by_rows: don't cut the rows of the tensor, as a matrix with its first dimension as height.
        seed: the seed of the draws.
        name: the name of the tensor.
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
        self._read, self.k, self.shape, self.dtype = read, k, shape, dtype
        self.by_rows, self.seed, self.name = by_rows, seed, name
        self.device = scratch.device
        self.numel = torch.Size(shape).numel()
        has_rows = by_rows and len(shape) > 1 and self.numel
        self.width = self.numel // shape[0] if has_rows else max(self.numel, 1)
        length = row_length(k)
        self.length = max(length // self.width, 1) * self.width if by_rows else length
        self._buffer = scratch.get(Slot.ROWS, k * min(self.length, self.numel), dtype)

    def __len__(self) -> int:
        return -(-self.numel // self.length)

    def __iter__(self) -> Iterator[Chunk]:
        return map(self.chunk, range(len(self)))

    def chunk(self, index: int) -> Chunk:
        """Read the chunk of an index."""
        start = index * self.length
        values = self.read(start, min(start + self.length, self.numel), self._buffer)
        if self.by_rows:
            values = values.view(len(values), -1, self.width)

        def draws(i: int) -> np.random.Generator:
            digest = sha256(f"{self.seed}\0{self.name}\0{i}\0{start}".encode()).digest()
            return np.random.Generator(np.random.SFC64(int.from_bytes(digest[:16], "little")))

        return Chunk(values, start, draws)

    def chunk_at(self, start: int) -> Chunk:
        """Read the chunk that begins at a position."""
        return self.chunk(start // self.length)

    def read(self, start: int, stop: int, buffer: torch.Tensor) -> torch.Tensor:
        """Read elements of all inputs into a buffer, as shape ``(k, n)``."""
        rows = buffer[: self.k * (stop - start)].view(self.k, stop - start)
        self._read(start, stop, rows.unbind())
        return rows

    def sample(self) -> torch.Tensor:
        """Read evenly spaced blocks of all inputs, at most everything; shape ``(k, m)``."""
        blocks = max(32, self.numel // (256 * _BLOCK))
        if self.numel <= blocks * _BLOCK:
            size = self.k * self.numel
            return self.read(0, self.numel, torch.empty(size, dtype=self.dtype, device=self.device))
        starts = np.linspace(0, self.numel - _BLOCK, blocks).astype(int).tolist()
        buffers = torch.empty(blocks, self.k * _BLOCK, dtype=self.dtype, device=self.device)
        rows = [
            self.read(start, start + _BLOCK, buffer)
            for start, buffer in zip(starts, buffers, strict=True)
        ]
        return torch.cat(rows, dim=1)


class ModelInputs:
    """The inputs' tensors end to end, as `TensorInputs` of one long tensor.

    Args:
        inputs_at: function that opens the inputs at a tensor, by its name, in given buffers.
        sizes: name -> elements of each tensor.
        k: the number of inputs.
    """

    def __init__(
        self, inputs_at: Callable[[str, Scratch], TensorInputs], sizes: Mapping[str, int], k: int
    ) -> None:
        self._inputs_at = inputs_at
        ends = list(accumulate(sizes.values()))
        self.starts = dict(zip(sizes, [0, *ends], strict=False))
        self.numel = ends[-1] if ends else 0
        self.k = k
        self._lock = RLock()
        self._computed: dict[Hashable, Any] = {}

    def once(self, key: Hashable, compute: Callable[[], T]) -> T:
        """Return a value that all tensors share, which the first to ask computes."""
        with self._lock:
            if key not in self._computed:
                self._computed[key] = compute()
            value: T = self._computed[key]
            return value

    def __iter__(self) -> Iterator[Chunk]:
        scratch = Scratch()
        for name, start in self.starts.items():
            for chunk in self._inputs_at(name, scratch):
                yield chunk._replace(values=chunk.values.flatten(1), start=start + chunk.start)

    def chunk_at(self, start: int) -> Chunk:
        """Read the chunk that begins at a position."""
        name, first = [(name, at) for name, at in self.starts.items() if at <= start][-1]
        chunk = self._inputs_at(name, Scratch()).chunk_at(start - first)
        return chunk._replace(values=chunk.values.flatten(1), start=start)

    def sample(self) -> torch.Tensor:
        """Read elements of all inputs, from each tensor by its size, as shape ``(k, m)``."""
        samples, size = [], sample_size(self.numel)
        for name in self.starts:
            inputs = self._inputs_at(name, Scratch())
            sample = inputs.sample()
            share = max(round(size * inputs.numel / self.numel), 8)
            chosen = np.linspace(0, sample.shape[1] - 1, min(share, sample.shape[1]))
            samples.append(sample[:, chosen.astype(int)])
        return torch.cat(samples, dim=1)
