"""Compare tensors of sources bit by bit, reading no more than is needed."""

from __future__ import annotations

from collections.abc import Iterable

from weightops.algebra.source import Source
from weightops.support.lazy import torch


def same_weights(a: Source, b: Source) -> bool:
    """Return True if both hold the same names, shapes, dtypes and bits. Fast where they differ."""
    if a is b or (a.identity is not None and a.identity == b.identity):
        return True
    if dict(a.specs) != dict(b.specs):
        return False
    return all(_same_bits((a, name), (b, name), most) for most in (64, None) for name in a.specs)


_SAMPLE = 1 << 20
"""Elements that are compared at both ends and in the middle of a larger tensor."""


def same_sample(a: Source, b: Source, name: str) -> bool:
    """Return True if a tensor has the same bits in both; of a large one, in three parts of it.

    Of two dtypes, the numbers count.
    """
    numel = a.specs[name].numel
    if b.specs[name].numel != numel:
        return False
    x, y = a.elements(name), b.elements(name)
    middle = max((numel - _SAMPLE) // 2, 0)
    for start in sorted({0, middle, max(numel - _SAMPLE, 0)}):
        stop = min(start + _SAMPLE, numel)
        first, second = x(start, stop), y(start, stop)
        if first.dtype != second.dtype:
            first, second = first.double(), second.double()
        if not _same(first, second):
            return False
    return True


def copy_of(source: Source, name: str, others: Iterable[str]) -> str | None:
    """Return the first of some names whose tensor has the same bits as another one in a source."""
    alike = (n for n in others if n != name and source.specs.get(n) == source.specs[name])
    return next((n for n in alike if _same_bits((source, name), (source, n))), None)


def _same_bits(a: tuple[Source, str], b: tuple[Source, str], most: int | None = None) -> bool:
    """Return True if two tensors of one spec have the same bits, or their first ``most`` elements.

    Fast where they differ at the beginning.
    """
    source, name = a
    numel = source.specs[name].numel
    numel = numel if most is None else min(most, numel)
    x, y = (source.elements(name) for source, name in (a, b))
    stops = [min(64, numel), *range(_SAMPLE, numel, _SAMPLE), numel]
    starts = [0, *stops[:-1]]
    return all(_same(x(i, j), y(i, j)) for i, j in zip(starts, stops, strict=True) if i < j)


def _same(x: torch.Tensor, y: torch.Tensor) -> bool:
    x, y = (part.detach().contiguous() for part in (x, y))
    return torch.equal(x.view(torch.uint8), y.to(x.device).view(torch.uint8))
