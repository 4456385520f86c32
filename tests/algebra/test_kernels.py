"""Arithmetic on chunks."""

from __future__ import annotations

import math

import pytest
import torch

from weightops.algebra.dtypes import SAFETENSORS, dtype_of
from weightops.algebra.kernels import Term, add_rows, combine, has_nonfinite
from weightops.algebra.scratch import Scratch, Slot

WITH_VALUES = {dtype_of(dtype) for name, dtype in SAFETENSORS.items() if name != "F4"}
"""The dtypes that torch converts numbers to."""


@pytest.mark.parametrize("dtype", sorted(WITH_VALUES, key=str))
def test_nonfinite_in_every_dtype(dtype: torch.dtype) -> None:
    chunk = torch.ones(100).to(dtype)
    assert not has_nonfinite(chunk)
    assert not has_nonfinite(chunk[:0])
    if dtype.is_floating_point and dtype.itemsize > 1:
        for value in (math.nan, math.inf, -math.inf):
            chunk[50] = value
            assert has_nonfinite(chunk)
    elif dtype.is_floating_point and str(dtype) != "torch.float8_e8m0fnu":
        assert has_nonfinite(torch.full((9,), math.nan).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_finite_numbers_whose_sum_overflows_are_finite(dtype: torch.dtype) -> None:
    chunk = torch.full((100,), torch.finfo(dtype).max, dtype=dtype)
    assert not has_nonfinite(chunk)
    chunk[50] = -math.inf
    assert has_nonfinite(chunk)
    chunk[7] = math.inf  # the sum of both is NaN
    assert has_nonfinite(chunk)


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 9])
def test_rows_are_added_in_order_to_the_bits_of_a_sum(k: int) -> None:
    rows = torch.randn(k, 4096, generator=torch.Generator().manual_seed(k))
    rows[:, :3] = torch.tensor([-0.0, math.inf, math.nan])
    expected = torch.zeros(4096)
    for row in rows:
        expected = expected + row
    result = add_rows(rows)
    assert torch.equal(result.view(torch.int32), expected.view(torch.int32))
    assert torch.equal(rows.sum(0).view(torch.int32), expected.view(torch.int32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("keep_anchor", [True, False])
def test_combine_keeps_elements_that_are_equal(dtype: torch.dtype, keep_anchor: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    anchor = torch.randn(1000, generator=generator).to(dtype)
    tensors = [anchor + torch.randn(1000, generator=generator).to(dtype) for _ in range(2)]
    for tensor in tensors:
        tensor[::2] = anchor[::2]
    out = torch.empty_like(anchor)
    terms = [Term(0.7, tensors[0], True), Term(-1.9, tensors[1], True)]
    combine(out, anchor, terms, keep_anchor, Scratch())
    plain = sum(c * (t.double() - anchor.double()) for c, t, _ in terms)
    plain = plain + anchor.double() if keep_anchor else plain
    assert torch.equal(out[::2], anchor[::2] if keep_anchor else torch.zeros(500, dtype=dtype))
    assert torch.allclose(out.double(), plain, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_buffers_of_two_slots_share_no_memory() -> None:
    scratch = Scratch()
    buffers = [scratch.get(slot, 10, torch.float32) for slot in Slot]
    buffers += [scratch.get(Slot.SHARED, 10, torch.float32, index=i) for i in (1, 2)]
    buffers.append(scratch.nested("owner").get(Slot.TOTAL, 10, torch.float32))
    assert len({buffer.data_ptr() for buffer in buffers}) == len(buffers)
    assert scratch.get(Slot.TOTAL, 5, torch.float32).data_ptr() == buffers[0].data_ptr()
    assert scratch.nested("owner") is scratch.nested("owner")
