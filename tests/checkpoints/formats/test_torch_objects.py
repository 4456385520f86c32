"""Plain values and tensors that `torch.save` wrote, read without running anything."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import nn

from weightops.checkpoints.formats.torch_objects import read_object
from weightops.errors import CheckpointError


def saved(value: Any) -> bytearray:
    content = io.BytesIO()
    torch.save(value, content)
    return bytearray(content.getvalue())


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        pairs = zip(a, b, strict=True)
        return type(a) is type(b) and all(same(x, y) for x, y in pairs)
    return type(a) is type(b) and a == b


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_states_of_training(kind: type[torch.optim.Optimizer]) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    optimizer = kind(model.parameters(), lr=0.1)
    for _ in range(3):
        model(torch.randn(5, 4)).square().sum().backward()
        optimizer.step()
    state = {
        "model": dict(model.state_dict()),
        "optimizer": optimizer.state_dict(),
        "random": torch.random.get_rng_state(),
        "lines": "[]",
        "step": 3,
        "part": torch.arange(10)[2:5],
        "transposed": torch.arange(6.0).reshape(2, 3).T,
    }
    read = read_object(saved(state), "x")
    assert same(state, read)
    optimizer.load_state_dict(read["optimizer"])


def test_what_is_not_plain_is_refused() -> None:
    for value in ({"a": nn.Linear(2, 2)}, {"a": print}):
        with pytest.raises(CheckpointError, match="x can't be read as a torch file: it holds"):
            read_object(saved(value), "x")
    nested: Any = 0
    for _ in range(100):
        nested = [nested]
    with pytest.raises(CheckpointError, match="nested more than 50 deep"):
        read_object(saved(nested), "x")
    shared: Any = [0]
    for _ in range(40):
        shared = [shared, shared]
    with pytest.raises(CheckpointError, match="more than 16 times its size"):
        read_object(saved(shared), "x")
    wide = {str(i): torch.zeros(1).expand(1000 + i) for i in range(1000)}
    with pytest.raises(CheckpointError, match="claim more bytes than there are"):
        read_object(saved(wide), "x")
    with pytest.raises(CheckpointError, match="x can't be read as a torch file"):
        read_object(saved({"a": 1})[:100], "x")
