"""Inner products of forms."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.large_models import large_models

from weightops import TaskVector, open_checkpoint
from weightops.engine.reduce import gram
from weightops.errors import MismatchError
from weightops.support import lazy


def test_gram_against_float64() -> None:
    pre, ft = large_models()
    half = {n: (t + pre[n]) / 2 for n, t in ft.items()}
    forms = [TaskVector(pre, ft).form, TaskVector(pre, half).form]
    for name, g in gram(forms).items():
        x, y = ft[name].double() - pre[name].double(), half[name].double() - pre[name].double()
        expected = torch.stack([torch.stack([x @ x, x @ y]), torch.stack([x @ y, y @ y])])
        assert torch.allclose(g, expected, rtol=1e-5)
        assert math.isclose(g[0, 1], g[1, 0])


def test_the_callers_precision_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    plain = torch.bmm
    monkeypatch.setattr(
        lazy.torch, "bmm", lambda *a: seen.append(torch.get_float32_matmul_precision()) or plain(*a)
    )
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        gram([open_checkpoint({"w": torch.ones(5000)}).form])
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert set(seen) == {"highest"}


def test_gram_of_several_shapes() -> None:
    forms = [open_checkpoint({"w": torch.ones(n)}).form for n in (2, 3)]
    with pytest.raises(MismatchError, match=r"w has shapes \(2,\) and \(3,\)"):
        gram(forms)
