"""The largest elements, against a sort."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weightops.algebra.kernels import CHUNK
from weightops.algebra.scratch import Scratch
from weightops.merging.methods.inputs import TensorInputs
from weightops.merging.methods.kept_elements import cutoffs


def inputs_of(*rows: torch.Tensor) -> TensorInputs:
    def read(start: int, stop: int, out: Sequence[torch.Tensor]) -> None:
        for row, part in zip(rows, out, strict=True):
            part.copy_(row[start:stop])

    shape, dtype = tuple(rows[0].shape), rows[0].dtype
    return TensorInputs(read, len(rows), shape, dtype, Scratch(), by_rows=False, seed=0, name="")


def masks(inputs: TensorInputs, counts: list[int], of_nonzero: bool = False) -> list[torch.Tensor]:
    """Return the mask of each count, for the first row."""
    values = torch.cat([chunk.values[0].clone() for chunk in inputs])
    kept = []
    for cutoff in cutoffs(inputs, lambda row, n: counts, of_nonzero=of_nonzero)[0]:
        flags = torch.cat([cutoff.flags(c.values[0].abs(), c.start) for c in inputs])
        trimmed = torch.cat([cutoff.keep(c.values[0].clone(), c.start) for c in inputs])
        assert torch.equal(trimmed, flags * values)
        kept.append(flags.bool())
    return kept


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.one_of(st.just(0.0), st.floats(-1e4, 1e4, width=32)), min_size=1, max_size=200),
    st.data(),
)
def test_the_largest_are_exact(values: list[float], data: st.DataObject) -> None:
    tensor = torch.tensor(values)
    k = data.draw(st.integers(0, len(values)))
    for rows in (tensor, tensor.double()):
        [mask] = masks(inputs_of(rows), [k])
        expected = torch.zeros_like(mask)
        expected[tensor.abs().sort(descending=True, stable=True).indices[:k]] = True
        assert torch.equal(mask, expected)


@pytest.mark.parametrize("kind", ["normal", "ties", "zeros", "sorted", "constant", "misleading"])
def test_the_largest_of_many_chunks(kind: str) -> None:
    n = 5 * CHUNK + 77
    tensor = torch.randn(n, generator=torch.Generator().manual_seed(0))
    if kind == "ties":
        tensor = tensor.bfloat16().float()
    elif kind == "zeros":
        tensor *= torch.rand(n) < 0.3
    elif kind == "sorted":
        tensor = tensor.sort().values
    elif kind == "constant":
        tensor.fill_(2.0)
    elif kind == "misleading":  # the blocks that are sampled are unlike the rest
        for start in np.linspace(0, n - 1024, 32).astype(int):
            tensor[start : start + 1024] *= 100
    order = tensor.abs().sort(descending=True, stable=True).indices
    counts = [1, n // 100, n // 5, n // 2, n - 5, n]
    inputs = inputs_of(tensor, tensor)
    both = zip(masks(inputs, counts), masks(inputs, counts, of_nonzero=True), strict=True)
    for count, (mask, again) in zip(counts, both, strict=True):
        assert torch.equal(mask, again)
        expected = torch.zeros(n, dtype=torch.bool)
        expected[order[:count]] = True
        assert torch.equal(mask, expected), count
