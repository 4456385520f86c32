"""Sources whose tensors are ranges of bytes in one file."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, groupby, islice
from typing import NamedTuple

from weightops.algebra.scratch import Scratch, Slot
from weightops.algebra.source import SAMPLED_WHOLE, Source, sample_blocks
from weightops.support.lazy import torch


class Extent(NamedTuple):
    """A range of bytes in a file."""

    start: int
    length: int

    @property
    def slice(self) -> slice:
        """The range as a slice."""
        return slice(self.start, self.start + self.length)


class FileSource(Source):
    """Tensors of one file, each read when it is asked for."""

    @abstractmethod
    def extent(self, name: str) -> Extent | None:
        """Return where a tensor is in the file; None if its elements don't follow each other."""

    def open(self, name: str, scratch: Scratch) -> Callable[[int, int], torch.Tensor]:
        extent, spec, [file] = self.extent(name), self.specs[name], self.files
        if extent is None:
            return super().open(name, scratch)
        dtype, width, begin = spec.dtype, spec.itemsize, extent.start

        def elements(start: int, stop: int) -> torch.Tensor:
            out = scratch.get(Slot.RESULT, stop - start, dtype, torch.device("cpu"))
            file.read_into(out.view(torch.uint8).numpy().data, begin + start * width)
            return out

        return elements

    def read_run(self, names: Sequence[str], scratch: Scratch) -> torch.Tensor:
        extents = [extent for extent in map(self.extent, names) if extent]
        if len(extents) < len(names):
            return super().read_run(names, scratch)
        numel = sum(self.specs[name].numel for name in names)
        run = scratch.get(Slot.ROWS, numel, self.specs[names[0]].dtype, torch.device("cpu"))
        self._read_bytes(run.view(torch.uint8).numpy().data, extents)
        return run

    def samples(self, names: Iterable[str]) -> Iterator[bytes]:
        placed = ((name, self.extent(name)) for name in names)
        for is_plain, group in groupby(placed, lambda pair: pair[1] is not None):
            if not is_plain:
                yield from super().samples(name for name, _ in group)
                continue
            blocks = (self._sampled(name, extent) for name, extent in group if extent)
            while batch := list(islice(blocks, 256)):
                sizes = [sum(length for _, length in extents) for extents in batch]
                buffer = memoryview(bytearray(sum(sizes)))
                self._read_bytes(buffer, chain.from_iterable(batch))
                for size in sizes:
                    yield bytes(buffer[:size])
                    buffer = buffer[size:]

    def _sampled(self, name: str, extent: Extent) -> list[Extent]:
        """Return the extents of the blocks in a tensor's sample."""
        if extent.length <= SAMPLED_WHOLE:
            return [extent]
        width = self.specs[name].itemsize
        blocks = sample_blocks(extent.length // width, width)
        return [Extent(extent.start + start * width, count * width) for start, count in blocks]

    def _read_bytes(self, buffer: memoryview, extents: Iterable[Extent]) -> None:
        """Fill a buffer with parts of the file, one after another; neighbours are read together."""
        [file] = self.files
        ranges, begin, end = [], 0, 0
        for start, length in extents:
            if start == end:
                end += length
                continue
            ranges.append((buffer[: end - begin], begin))
            buffer, begin, end = buffer[end - begin :], start, start + length
        file.read_ranges([*ranges, (buffer, begin)])
