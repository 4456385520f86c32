"""Tensors as bytes, in shares of about equal size."""

from __future__ import annotations

import pytest
import torch

from weightops.training.leaders import pack, split_names, unpack


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_packing(count: int) -> None:
    state = {
        "a": torch.ones(3, dtype=torch.float16),
        "b": torch.arange(4.0),
        "c": torch.tensor(7),
        "d": torch.ones(0),
    }
    shares = split_names(state, count)
    assert sorted(name for share in shares for name in share) == sorted(state)
    for share in shares:
        unpacked = unpack(pack(state, share), state, share)
        assert all(torch.equal(unpacked[name], state[name]) for name in share)
