"""Methods that take some of one model's elements into another: Arcee Fusion and NearSwap."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from weightops.algebra.kernels import add_rows
from weightops.errors import OptionError
from weightops.merging.methods.inputs import Chunk, TensorInputs, sample_size
from weightops.merging.methods.kept_elements import cutoffs
from weightops.merging.methods.method import chunks
from weightops.merging.methods.rows import vector_length
from weightops.support.lazy import torch

_EPSILON = 1e-8
"""What is added to probabilities before their logarithm is taken."""


class Divergences(NamedTuple):
    """The divergence of each row of the last dimension, and some elements' importances."""

    rows: torch.Tensor
    sample: torch.Tensor


def row_divergences(inputs: TensorInputs) -> Divergences:
    """Return KL(softmax(theta_2) || softmax(theta_1)) of each row, and importances of a sample.

    Raises:
        OptionError: for other than two models.
    """
    if inputs.k != 2:
        raise OptionError(f"arcee_fusion takes a base and one other model, and here are {inputs.k}")
    length = vector_length(inputs)
    step = max(inputs.numel // sample_size(inputs.numel), 1)
    while math.gcd(step, length) > 1:  # so that the sample is from all columns
        step += 1
    rows = torch.empty(inputs.numel // length, dtype=inputs.dtype, device=inputs.device)
    sample = torch.empty(-(-inputs.numel // step), dtype=inputs.dtype, device=inputs.device)
    buffer = torch.empty(0, dtype=inputs.dtype, device=inputs.device)
    for chunk in inputs:
        models = chunk.values.reshape(2, -1, length)
        buffer = buffer.resize_(models.shape)
        q, p = torch.softmax(models, dim=-1, out=buffer).add_(_EPSILON)
        first, count = chunk.start // length, models.shape[1]
        rows[first : first + count] = p.mul_(torch.log_(torch.div(p, q, out=q))).sum(-1)
        taken = -(-chunk.start // step)
        start, stop = taken * step, chunk.start + count * length
        base, other = models.reshape(2, -1)[:, start - chunk.start :: step]
        places = torch.arange(start, stop, step, device=inputs.device).div_(
            length, rounding_mode="floor"
        )
        sample[taken : taken + len(places)] = (other - base).abs_() * rows[places]
    return Divergences(rows, sample)


class _Importances:
    """The importances of a tensor's elements, as one row of inputs."""

    def __init__(self, inputs: TensorInputs, divergences: Divergences) -> None:
        self._inputs, self._divergences = inputs, divergences
        self.numel = inputs.numel

    def __iter__(self) -> Iterator[Chunk]:
        return map(self._importances, self._inputs)

    def chunk_at(self, start: int) -> Chunk:
        """Return the importances of the chunk that begins at a position."""
        return self._importances(self._inputs.chunk_at(start))

    def _importances(self, chunk: Chunk) -> Chunk:
        base, other = chunk.values
        change = other.sub_(base).view(-1, vector_length(self._inputs))
        values = importances_(change, self._divergences.rows, chunk.start)
        return chunk._replace(values=values[None])

    def sample(self) -> torch.Tensor:
        """Return the importances of the sample; shape ``(1, m)``."""
        return self._divergences.sample[None]


def importances_(change: torch.Tensor, divergences: torch.Tensor, start: int) -> torch.Tensor:
    """Return the importance of the elements of whole rows, flat, in the place of their change.

    Args:
        change: the difference of two models, shape ``(rows, length)``.
        divergences: the divergence of each row of the tensor.
        start: the position of the first element.
    """
    first = start // change.shape[1]
    return change.abs_().mul_(divergences[first : first + len(change), None]).view(-1)


def least_importance(inputs: TensorInputs, divergences: Divergences) -> float:
    """Return the least importance that is taken: the median and 1.5 quartile ranges."""
    n, elements = inputs.numel, _Importances(inputs, divergences)
    counts = [n - int(q * (n - 1)) for q in (0.25, 0.5, 0.75)]  # the largest of which is the value
    if n <= 4:
        [chunk] = elements
        ordered = chunk.values[0].sort(descending=True).values
        first, median, third = (float(ordered[count - 1]) for count in counts)
    else:
        [found] = cutoffs(elements, lambda _, __: counts, lambda importances: importances)
        first, median, third = (cutoff.magnitude for cutoff in found)
    return median + 1.5 * (third - first)


@chunks(by_rows=True, length=vector_length, divergences=row_divergences, least=least_importance)
def arcee_fusion(
    models: torch.Tensor, length: int, divergences: Divergences, least: float, start: int
) -> torch.Tensor:
    """Take the most important changes of the second model into the first, the base (Arcee Fusion).

        importance = |theta_2 - theta_1| KL(softmax(theta_2) || softmax(theta_1)), row by row
        merged = theta_2 where importance >= median + 1.5 (third - first quartile), else theta_1

    Source: mergekit 0.1.5. Its quartiles are of a random million of elements where there are more;
    here they are exact.

    Args:
        models: shape ``(2, rows, width)``.
        length: the length of the last dimension.
        divergences: the divergence of each row.
        least: the importance from which on elements are taken.
        start: the position of the first element.
    """
    base, other = models
    change = (other - base).view(-1, length)
    importances = importances_(change, divergences.rows, start).view(base.shape)
    taken = torch.ge(importances, least, out=importances)  # 1 and 0, with which a lerp selects
    return torch.lerp(base, other, taken, out=base)


@chunks()
def nearswap(deltas: torch.Tensor, *, t: float = 0.001) -> torch.Tensor:
    """Move the base towards models by at most t at each element (NearSwap).

        merged = sum_i tau_i min(t / |tau_i|, 1)

    Source: https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001

    Args:
        deltas: shape ``(k, n)``; mergekit takes one.
        t: the largest change of an element. Below 1e-6, elements that change less than that are
            scaled by t / 1e-6, as in mergekit.

    Raises:
        OptionError: if t is negative.
    """
    if t < 0:
        raise OptionError(f"t of nearswap is the largest change, and can't be {t}")
    if t < 1e-6:
        deltas.mul_(t / 1e-6)
    deltas.clamp_(-t, t)
    return deltas[0] if len(deltas) == 1 else add_rows(deltas)
