"""The largest elements of tensors that are seen chunk by chunk: exact, without sorting."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from weightops.errors import OptionError
from weightops.keys import Each
from weightops.methods.parts import Parts, Vector

Array = npt.NDArray[np.floating]

_MARGIN = 0.02  # share of a sample by which a threshold is bracketed to either side


class Limit(NamedTuple):
    """What is among the largest: all above a magnitude, and of those that equal it the ones before a position."""

    magnitude: float
    position: int

    def mask(self, magnitudes: Array, start: int) -> npt.NDArray[np.bool_]:
        """True for the largest; ``magnitudes`` is the flat part of the tensor from ``start``."""
        stop = start + magnitudes.size
        if stop <= self.position:
            return magnitudes >= self.magnitude
        if start >= self.position:
            return magnitudes > self.magnitude
        before = np.arange(start, stop) < self.position
        found: npt.NDArray[np.bool_] = (magnitudes > self.magnitude) | ((magnitudes == self.magnitude) & before)
        return found

    def after(self, start: int) -> Limit:
        """The same limit with positions counted from ``start``."""
        return Limit(self.magnitude, self.position - start)


ALL, NONE = Limit(-1.0, 0), Limit(math.inf, 0)


def limits(
    parts: Parts | Vector, counts: Sequence[Sequence[int]], measure: Callable[[torch.Tensor], torch.Tensor] = torch.abs
) -> list[list[Limit]]:
    """The limit of the ``count`` largest elements, exactly so many, for each row and each of some counts; among equals the first.

    A sample brackets each threshold; one pass counts what is above the bracket and collects what is inside; the k-th
    largest of the latter is the threshold (Floyd and Rivest, 1975). A bracket that misses is widened to everything.

    Args:
        parts: the tensors.
        counts: how many to keep, for each row.
        measure: values ``(k, n)`` -> magnitudes ``(rows, n)``, not negative.
    """
    sample = np.sort(measure(parts.sample()).numpy(), axis=1)
    brackets = [
        [_Bracket.around(row, count, parts.numel) for count in wanted]
        for row, wanted in zip(sample, counts, strict=True)
    ]
    while todo := [(i, b) for i, row in enumerate(brackets) for b in row if b.limit is None]:
        for chunk in parts:
            magnitudes = measure(chunk.values).numpy()
            for i, bracket in todo:
                bracket.scan(magnitudes[i])
        for _, bracket in todo:
            bracket.resolve()
    if ties := [(i, b) for i, row in enumerate(brackets) for b in row if b.spare]:
        for chunk in parts:
            magnitudes = measure(chunk.values).numpy()
            for i, bracket in ties:
                bracket.place(magnitudes[i], chunk.start)
            if not any(bracket.spare for _, bracket in ties):
                break
    return [[bracket.limit or NONE for bracket in row] for row in brackets]


@dataclass
class _Bracket:
    """The search for one threshold: what has been counted above, at and below the ends of an interval."""

    count: int
    numel: int
    low: float
    high: float
    above: int = 0
    at_high: int = 0
    at_low: int = 0
    inside: list[Array] = field(default_factory=list)
    limit: Limit | None = None
    spare: int = 0  # of the elements that equal the threshold, how many are still to be kept

    @classmethod
    def around(cls, sample: Array, count: int, numel: int) -> _Bracket:
        if count >= numel or count <= 0:
            return cls(count, numel, 0, 0, limit=ALL if count > 0 or not numel else NONE)
        place = len(sample) - count * len(sample) / numel
        low, high = (int(place + margin * len(sample)) for margin in (-_MARGIN, _MARGIN))
        everything = len(sample) == numel
        return cls(
            count,
            numel,
            -1.0 if low < 0 or everything else float(sample[low]),
            math.inf if high >= len(sample) or everything else float(sample[high]),
        )

    def scan(self, x: Array) -> None:
        self.above += int(np.count_nonzero(x > self.high))
        self.at_high += int(np.count_nonzero(x == self.high))
        self.at_low += int(np.count_nonzero(x == self.low))
        if self.high > self.low:
            self.inside.append(x[(x > self.low) & (x < self.high)])

    def resolve(self) -> None:
        inside = np.concatenate(self.inside) if self.inside else np.empty(0, dtype=np.float32)
        left = self.count - self.above - self.at_high
        if self.above < self.count <= self.above + self.at_high:
            self._found(self.high, self.count - self.above, self.at_high)
        elif 0 < left <= len(inside):
            kth = np.partition(inside, len(inside) - left)[len(inside) - left]
            self._found(float(kth), left - int(np.count_nonzero(inside > kth)), int(np.count_nonzero(inside == kth)))
        elif 0 < left - len(inside) <= self.at_low:
            self._found(self.low, left - len(inside), self.at_low)
        elif self.low < 0 and self.high == math.inf:
            self.limit = ALL  # fewer comparable numbers than asked for: there are NaNs
        else:
            self.low, self.high, self.above, self.at_high, self.at_low = -1.0, math.inf, 0, 0, 0
        self.inside = []

    def _found(self, magnitude: float, kept: int, equal: int) -> None:
        self.limit = Limit(magnitude, self.numel)
        self.spare = kept if kept < equal else 0

    def place(self, x: Array, start: int) -> None:
        """Find the position up to which elements that equal the threshold are kept."""
        if self.spare and self.limit is not None:
            places = np.flatnonzero(x == self.limit.magnitude)
            if self.spare <= len(places):
                self.limit = Limit(self.limit.magnitude, start + int(places[self.spare - 1]) + 1)
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
