"""The largest elements of tensors that are seen chunk by chunk: exact, without sorting."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from weightops.algebra.names import Each
from weightops.errors import OptionError
from weightops.merging.methods.inputs import ModelInputs, TensorInputs

Array = npt.NDArray[np.floating]
Places = npt.NDArray[np.int32]

_ERRORS = (
    4  # standard errors of a sample's quantile by which a threshold is bracketed to either side
)


class Cutoff(NamedTuple):
    """What is among the largest: all above a magnitude, and of those that equal it the ones before a position."""

    magnitude: float
    position: int

    def flags(self, magnitudes: torch.Tensor, start: int) -> torch.Tensor:
        """1 for the largest, 0 for the rest; ``magnitudes`` is the flat part of the tensor from ``start``."""
        found = torch.empty_like(magnitudes)
        cut = min(max(self.position - start, 0), len(magnitudes))
        torch.ge(magnitudes[:cut], self.magnitude, out=found[:cut])
        torch.gt(magnitudes[cut:], self.magnitude, out=found[cut:])
        return found

    def keep(self, delta: torch.Tensor, start: int) -> torch.Tensor:
        """Make what isn't among the largest 0, in place; ``delta`` is the flat part of the tensor from ``start``."""
        cut = min(max(self.position - start, 0), len(delta))
        below = torch.nextafter(*torch.tensor([self.magnitude, -math.inf], dtype=delta.dtype))
        for part, limit in ((delta[:cut], float(below)), (delta[cut:], self.magnitude)):
            if len(part) and limit >= 0:
                torch.hardshrink(part, limit, out=part)  # keeps what is strictly larger
        return delta

    def after(self, start: int) -> Cutoff:
        """The same limit with positions counted from ``start``."""
        return Cutoff(self.magnitude, self.position - start)


ALL, NONE = Cutoff(-1.0, 0), Cutoff(math.inf, 0)


def cutoffs(
    parts: TensorInputs | ModelInputs,
    counts: Callable[[int, int], Sequence[int]],
    measure: Callable[[torch.Tensor], torch.Tensor] = torch.abs_,
    *,
    of_nonzero: bool = False,
) -> list[list[Cutoff]]:
    """The limits of each row's largest elements, exactly as many as are wanted; among equals the first.

    A sample brackets each threshold; one pass counts what is above the bracket and collects what is inside; the k-th
    largest of the latter is the threshold (Floyd and Rivest, 1975). A bracket that misses is widened, in the end to everything.

    Args:
        parts: the tensors.
        counts: how many are wanted, once or several times, from the row and how many elements there are to choose from.
        measure: values ``(k, n)``, which it may overwrite, -> magnitudes ``(rows, n)``, not negative.
        of_nonzero: choose from the elements that aren't 0.
    """
    sample = np.sort(measure(parts.sample()).cpu().numpy(), axis=1)
    brackets = [
        [
            _Bracket(row, parts.numel, lambda n, i=i, j=j: counts(i, n)[j], of_nonzero)  # type: ignore[misc]
            for j in range(len(counts(i, parts.numel)))
        ]
        for i, row in enumerate(sample)
    ]
    while todo := [(i, b) for i, row in enumerate(brackets) for b in row if b.limit is None]:
        for chunk in parts:
            magnitudes = measure(chunk.values).cpu().numpy()
            for i, bracket in todo:
                bracket.scan(magnitudes[i], chunk.start)
        for _, bracket in todo:
            bracket.resolve()
    if ties := [(i, b) for i, row in enumerate(brackets) for b in row if b.spare]:
        for chunk in parts:
            magnitudes = measure(chunk.values).cpu().numpy()
            for i, bracket in ties:
                bracket.place(magnitudes[i], chunk.start)
            if not any(bracket.spare for _, bracket in ties):
                break
    return [[bracket.limit or NONE for bracket in row] for row in brackets]


@dataclass
class _Bracket:
    """The search for one threshold: what has been counted above, at and below the ends of an interval."""

    sample: Array
    numel: int
    wanted: Callable[[int], int]
    of_nonzero: bool
    errors: float = _ERRORS
    limit: Cutoff | None = None
    spare: int = 0  # of the elements that equal the threshold, how many are still to be kept

    def __post_init__(self) -> None:
        if not self.of_nonzero and not 0 < self.wanted(self.numel) < self.numel:
            self.limit = ALL if self.wanted(self.numel) else NONE
        self._aim()

    def _aim(self) -> None:
        """Put the ends where the sample says that the threshold is."""
        self.low, self.high = -1.0, math.inf
        self.above = self.at_high = self.at_low = self.nonzero = 0
        self.inside: list[tuple[Array, Places, int]] = []
        m = len(self.sample)
        if m < self.numel:
            share = np.count_nonzero(self.sample) / m if self.of_nonzero else 1.0
            place = m * (1 - self.wanted(round(share * self.numel)) / self.numel)
            margin = self.errors * 0.5 * math.sqrt(m)
            if place >= margin:
                self.low = float(self.sample[int(place - margin)])
            if place + margin < m:
                self.high = float(self.sample[int(place + margin)])

    def scan(self, x: Array, start: int) -> None:
        over, from_high = x > self.low, x >= self.high
        above = int(np.count_nonzero(x > self.high))
        self.above += above
        self.nonzero += int(np.count_nonzero(x > 0)) if self.of_nonzero else 0
        self.at_high += int(np.count_nonzero(from_high)) - above
        self.at_low += int(np.count_nonzero(x == self.low))
        if self.high > self.low:
            places = np.flatnonzero(over ^ from_high)
            self.inside.append((x[places], places.astype(np.int32), start))

    def resolve(self) -> None:
        inside = np.concatenate(
            [values for values, _, _ in self.inside] or [np.empty(0, dtype=np.float32)]
        )
        count = self.wanted(self.nonzero if self.of_nonzero else self.numel)
        left = count - self.above - self.at_high
        if not 0 < count < self.numel:
            self.limit = ALL if count else NONE
        elif self.above < count <= self.above + self.at_high:
            self._found(self.high, count - self.above, self.at_high)
        elif 0 < left <= len(inside):
            kth = np.partition(inside, len(inside) - left)[len(inside) - left]
            kept = left - int(np.count_nonzero(inside > kth))
            equal = np.concatenate(
                [places[values == kth] + start for values, places, start in self.inside]
            )
            self.limit = Cutoff(
                float(kth), self.numel if kept == len(equal) else int(equal[kept - 1]) + 1
            )
        elif 0 < left - len(inside) <= self.at_low:
            self._found(self.low, left - len(inside), self.at_low)
        elif self.low < 0 and self.high == math.inf:
            self.limit = ALL  # fewer comparable numbers than asked for: there are NaNs
        else:
            self.errors *= 8
            self._aim()
        self.inside = []

    def _found(self, magnitude: float, kept: int, equal: int) -> None:
        self.limit = Cutoff(magnitude, self.numel)
        self.spare = kept if kept < equal else 0

    def place(self, x: Array, start: int) -> None:
        """Find the position up to which elements that equal the threshold are kept."""
        if self.spare and self.limit is not None:
            places = np.flatnonzero(x == self.limit.magnitude)
            if self.spare <= len(places):
                self.limit = Cutoff(self.limit.magnitude, start + int(places[self.spare - 1]) + 1)
                self.spare = 0
            else:
                self.spare -= len(places)


def each(value: float | Each, k: int) -> list[float]:
    """An option's value for each of k inputs.

    Raises:
        OptionError: if it is given for another number of inputs.
    """
    if not isinstance(value, Each):
        return [value] * k
    if len(value) != k:
        raise OptionError(f"there are {k} inputs, and values for {len(value)}: {list(value)}")
    return list(value)


def fraction(value: float, what: str = "density") -> float:
    """A fraction, checked.

    Raises:
        OptionError: if it is outside [0, 1].
    """
    if not 0 <= value <= 1:
        raise OptionError(f"{what} is a fraction, from 0 to 1, not {value}")
    return value


def count(density: float, numel: int) -> int:
    """How many of ``numel`` elements a density keeps: rounded down, but at least one unless it is 0."""
    return max(int(fraction(density) * numel), 1) if density > 0 else 0
