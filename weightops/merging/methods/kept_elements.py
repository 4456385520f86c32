"""The largest elements of tensors that are read chunk by chunk: exact, without sorting."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeAlias

if TYPE_CHECKING:
    import numpy.typing as npt

from weightops.merging.methods.inputs import Chunk
from weightops.support.lazy import np, torch

Array: TypeAlias = "npt.NDArray[np.floating]"
Positions: TypeAlias = "npt.NDArray[np.int32]"
Counts = Callable[[int, int], Sequence[int]]
"""Gives the numbers of elements to keep, from a row's index and its number of candidates."""


class Elements(Protocol):
    """Rows of elements that are read chunk by chunk, and a sample of them."""

    numel: int

    def __iter__(self) -> Iterator[Chunk]: ...
    def chunk_at(self, start: int) -> Chunk:
        """Read the chunk that begins at a position again."""
        ...

    def sample(self) -> torch.Tensor:
        """Read some elements, spread over all; shape ``(k, m)``."""


_STANDARD_ERRORS = 4
"""How far a bracket reaches to either side of a threshold, in errors of a sample's quantile."""


class Cutoff(NamedTuple):
    """The border of the largest elements of a tensor.

    All elements above a magnitude are among the largest, and of those that equal it the ones before
    a position.
    """

    magnitude: float
    position: int

    def flags(self, magnitudes: torch.Tensor, start: int) -> torch.Tensor:
        """Return 1 for the largest elements and 0 for the rest.

        Args:
            magnitudes: a part of the flat tensor.
            start: the position of the part.
        """
        flags = torch.empty_like(magnitudes)
        cut = self._cut(magnitudes, start)
        torch.ge(magnitudes[:cut], self.magnitude, out=flags[:cut])
        torch.gt(magnitudes[cut:], self.magnitude, out=flags[cut:])
        return flags

    def keep(self, delta: torch.Tensor, start: int) -> torch.Tensor:
        """Set all but the largest elements to 0, in place; the arguments are those of `flags`."""
        cut = self._cut(delta, start)
        scalar = np.float64 if delta.dtype == torch.float64 else np.float32
        below = float(np.nextafter(scalar(self.magnitude), scalar(-math.inf)))
        for part, threshold in ((delta[:cut], below), (delta[cut:], self.magnitude)):
            if len(part) and threshold >= 0:
                torch.hardshrink(part, threshold, out=part)  # keeps what is strictly larger
        return delta

    def _cut(self, part: torch.Tensor, start: int) -> int:
        return min(max(self.position - start, 0), len(part))

    def counted_from(self, start: int) -> Cutoff:
        """Return the same border with positions counted from ``start``."""
        return Cutoff(self.magnitude, self.position - start)


ALL, NONE = Cutoff(-1.0, 0), Cutoff(math.inf, 0)


def _magnitudes(values: torch.Tensor) -> torch.Tensor:
    return values.abs_()


def cutoffs(
    inputs: Elements,
    counts: Counts,
    measure: Callable[[torch.Tensor], torch.Tensor] = _magnitudes,
    *,
    of_nonzero: bool = False,
) -> list[list[Cutoff]]:
    """Find the cutoffs that keep exactly as many elements as are wanted; among equals the first.

    A sample brackets each threshold. One pass counts the elements above the bracket and collects
    those inside, among which the threshold is an order statistic (Floyd and Rivest, 1975). A
    bracket that misses is widened, in the end to everything.

    Args:
        inputs: the tensors.
        counts: the numbers of elements to keep, one or several for each row.
        measure: function of values ``(k, n)``, which it may overwrite, that returns nonnegative
            magnitudes ``(rows, n)``.
        of_nonzero: choose from the elements that aren't 0.

    Returns:
        For each row, a cutoff for each of its counts.
    """
    sample = np.sort(measure(inputs.sample()).cpu().numpy(), axis=1)
    brackets = [
        [
            _Bracket(values, inputs.numel, partial(_count, counts, row, place), of_nonzero)
            for place in range(len(counts(row, inputs.numel)))
        ]
        for row, values in enumerate(sample)
    ]
    numbered = [(row, bracket) for row, found in enumerate(brackets) for bracket in found]
    while unresolved := [(row, bracket) for row, bracket in numbered if bracket.cutoff is None]:
        for chunk in inputs:
            magnitudes = measure(chunk.values.flatten(1)).cpu().numpy()
            for row, bracket in unresolved:
                bracket.scan(magnitudes[row], chunk.start)
        for _, bracket in unresolved:
            bracket.resolve()
    for row, bracket in numbered:
        if bracket.last_kept:
            chunk = inputs.chunk_at(bracket.last_kept.start)
            bracket.find_position(measure(chunk.values.flatten(1))[row].cpu().numpy())
    return [[bracket.cutoff or NONE for bracket in found] for found in brackets]


def _count(counts: Counts, row: int, place: int, numel: int) -> int:
    return counts(row, numel)[place]


class _Equals(NamedTuple):
    """The elements of a part that equal an end of an interval."""

    start: int
    """The position of the part."""
    number: int
    """How many there are, or how many of them are kept."""


@dataclass
class _Bracket:
    """The search for one cutoff: an interval of magnitudes, and how many are above, at and inside.

    Attributes:
        sample: some of the magnitudes, sorted.
        numel: the number of elements.
        wanted: the number of elements to keep, from the number of candidates.
        of_nonzero: only elements that aren't 0 are candidates.
        cutoff: the result, or None.
        last_kept: the part that holds the last element to keep of those that equal the threshold,
            where its position is still to be found.
    """

    sample: Array
    numel: int
    wanted: Callable[[int], int]
    of_nonzero: bool
    cutoff: Cutoff | None = None
    last_kept: _Equals | None = None

    def __post_init__(self) -> None:
        if not self.of_nonzero and not 0 < self.wanted(self.numel) < self.numel:
            self.cutoff = ALL if self.wanted(self.numel) else NONE
        self._standard_errors = _STANDARD_ERRORS
        self._aim()

    def _aim(self) -> None:
        """Put the ends of the interval where the sample says that the threshold is between."""
        self.low, self.high = -1.0, math.inf
        self.above = self.nonzero = 0
        self.at_high: list[_Equals] = []
        self.at_low: list[_Equals] = []
        self.inside: list[tuple[Array, Positions, int]] = []
        size = len(self.sample)
        if size < self.numel:
            share = np.count_nonzero(self.sample) / size if self.of_nonzero else 1.0
            place = size * (1 - self.wanted(round(share * self.numel)) / self.numel)
            margin = self._standard_errors * 0.5 * math.sqrt(size)
            if place >= margin:
                self.low = float(self.sample[int(place - margin)])
            if place + margin < size:
                self.high = float(self.sample[int(place + margin)])
        self._counts_low, self._counts_high = map(self._is_common, (self.low, self.high))

    def _is_common(self, end: float) -> bool:
        """Return whether a tensor has many of an end of the interval, as its sample has several.

        These are counted, and not collected.
        """
        return int(np.count_nonzero(self.sample == end)) > 1

    def scan(self, magnitudes: Array, start: int) -> None:
        """Count the elements of a part above and at the ends, and collect those inside."""
        above = beyond = magnitudes > self.high
        self.above += (count := int(np.count_nonzero(above)))
        if self._counts_high:
            beyond = magnitudes >= self.high
            self.at_high.append(_Equals(start, int(np.count_nonzero(beyond)) - count))
        if self._counts_low:
            self.at_low.append(_Equals(start, int(np.count_nonzero(magnitudes == self.low))))
        if self.of_nonzero:
            self.nonzero += int(np.count_nonzero(magnitudes > 0))
        if self.high > self.low:
            positions = np.flatnonzero((magnitudes > self.low) ^ beyond)
            self.inside.append((magnitudes[positions], positions.astype(np.int32), start))

    def resolve(self) -> None:
        """Find the cutoff after a scan of all parts, or widen the interval."""
        inside = np.concatenate(
            [values for values, _, _ in self.inside] or [np.empty(0, dtype=np.float32)]
        )
        count = self.wanted(self.nonzero if self.of_nonzero else self.numel)
        at_high, at_low = (sum(part.number for part in at) for at in (self.at_high, self.at_low))
        left = count - self.above - at_high
        if not 0 < count < self.numel:
            self.cutoff = ALL if count else NONE
        elif self.above < count <= self.above + at_high:
            self._cut_at(self.high, count - self.above, self.at_high)
        elif 0 < left <= len(inside):
            self._cut_inside(inside, left)
        elif 0 < left - len(inside) <= at_low:
            self._cut_at(self.low, left - len(inside), self.at_low)
        elif self.low < 0 and self.high == math.inf:
            self.cutoff = ALL  # fewer comparable numbers than asked for: there are NaNs
        else:
            self._standard_errors *= 8
            self._aim()
        self.inside = []

    def _cut_inside(self, inside: Array, count: int) -> None:
        """Cut at the ``count``-th largest of the elements inside."""
        threshold = np.partition(inside, len(inside) - count)[len(inside) - count]
        kept = count - int(np.count_nonzero(inside > threshold))
        equal = np.concatenate(
            [positions[values == threshold] + start for values, positions, start in self.inside]
        )
        position = self.numel if kept == len(equal) else int(equal[kept - 1]) + 1
        self.cutoff = Cutoff(float(threshold), position)

    def _cut_at(self, end: float, kept: int, equals: Sequence[_Equals]) -> None:
        """Cut at an end of the interval, of whose equals some are kept."""
        self.cutoff = Cutoff(end, self.numel)
        if kept < sum(part.number for part in equals):
            for part in equals:
                if kept <= part.number:
                    self.last_kept = _Equals(part.start, kept)
                    return
                kept -= part.number

    def find_position(self, magnitudes: Array) -> None:
        """Find in the part that holds it the last element to keep of those at the threshold."""
        if self.cutoff is not None and self.last_kept is not None:
            equal = np.flatnonzero(magnitudes == self.cutoff.magnitude)
            last = self.last_kept.start + int(equal[self.last_kept.number - 1])
            self.cutoff = Cutoff(self.cutoff.magnitude, last + 1)
