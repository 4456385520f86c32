"""Methods that take some of one model's elements into another: Arcee Fusion and NearSwap."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import torch

from weightops.errors import OptionError
from weightops.merging.methods.inputs import Chunk, TensorInputs
from weightops.merging.methods.kept_elements import cutoffs
from weightops.merging.methods.method import chunks
from weightops.merging.methods.rows import vector_length

_EPSILON = 1e-8
"""What is added to probabilities before their logarithm is taken."""
_SAMPLE = 65_536
"""The least number of elements of a sample."""


def _importance(models: torch.Tensor, length: int) -> torch.Tensor:
    """Return the importance of each element's change, from whole rows ``(2, rows, width)``."""
    base, other = models.reshape(2, -1, length)
    p, q = (torch.softmax(rows, dim=-1) + _EPSILON for rows in (other, base))
    divergence = (p * torch.log(p / q)).sum(-1, keepdim=True)
    importance: torch.Tensor = (other - base).abs() * divergence
    return importance.reshape(models.shape[1:])


class _Importances:
    """The importances of a tensor's elements, as one row of inputs."""

    def __init__(self, inputs: TensorInputs, length: int) -> None:
        self._inputs, self._length, self.numel, self.k = inputs, length, inputs.numel, 1

    def __iter__(self) -> Iterator[Chunk]:
        for chunk in self._inputs:
            values = _importance(chunk.values, self._length).reshape(1, -1)
            yield chunk._replace(values=values)

    def sample(self) -> torch.Tensor:
        """Compute the importances in evenly spaced rows; shape ``(1, m)``."""
        inputs = self._inputs
        height = inputs.numel // inputs.width
        count = min(height, max(_SAMPLE, inputs.numel // 256) // inputs.width + 1)
        ends = np.linspace(0, height, count + 1).astype(int).tolist()
        buffer = torch.empty(2 * inputs.width, dtype=inputs.dtype, device=inputs.device)
        rows = []
        for start, _ in pairwise(ends):
            first = start * inputs.width
            values = inputs.read(first, first + inputs.width, buffer)
            rows.append(_importance(values.view(2, 1, -1), self._length).reshape(-1))
        return torch.cat(rows)[None]


def least_importance(inputs: TensorInputs, length: int) -> float:
    """Return the importance from which on elements are taken: the median and 1.5 quartile ranges.

    Raises:
        OptionError: for other than two models.
    """
    if inputs.k != 2:
        raise OptionError(f"arcee_fusion takes a base and one other model, and here are {inputs.k}")
    n = inputs.numel
    counts = [n - int(q * (n - 1)) for q in (0.25, 0.5, 0.75)]  # the largest of which is the value
    if n * 2 <= _SAMPLE:
        [chunk] = _Importances(inputs, length)
        ordered = chunk.values[0].sort(descending=True).values
        first, median, third = (float(ordered[count - 1]) for count in counts)
    else:
        [found] = cutoffs(_Importances(inputs, length), lambda _, __: counts, torch.Tensor.clone)
        first, median, third = (cutoff.magnitude for cutoff in found)
    return median + 1.5 * (third - first)


@chunks(by_rows=True, length=vector_length, least=least_importance)
def arcee_fusion(models: torch.Tensor, length: int, least: float) -> torch.Tensor:
    """Take the most important changes of the second model into the first, the base (Arcee Fusion).

        importance = |theta_2 - theta_1| KL(softmax(theta_2) || softmax(theta_1)), row by row
        merged = theta_2 where importance >= median + 1.5 (third - first quartile), else theta_1

    Source: mergekit 0.1.5. Its quartiles are of a random million of elements where there are more;
    here they are exact.

    Args:
        models: shape ``(2, rows, width)``.
        length: the length of the last dimension.
        least: the importance from which on elements are taken.
    """
    taken = _importance(models, length) >= least
    return torch.where(taken, models[1], models[0])


@chunks()
def nearswap(deltas: torch.Tensor, *, t: float = 0.001) -> torch.Tensor:
    """Move the base towards models by at most t at each element (NearSwap).

        merged = sum_i tau_i min(t / |tau_i|, 1)

    Source: https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001

    Args:
        deltas: shape ``(k, n)``; mergekit takes one.
        t: the largest change of an element. Below 1e-6, elements that change less than that are
            scaled by t / 1e-6, as in mergekit.
    """
    return (deltas * (t / deltas.abs().clamp(min=1e-6)).clamp(0, 1)).sum(0)
