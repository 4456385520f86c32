"""Arcee Fusion and NearSwap, against formulas in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.merges import check, deltas, family

from weightops.errors import OptionError
from weightops.merging.merge import merge


def fused(base: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return Arcee Fusion of two matrices, by sorting."""

    def softmax(x: np.ndarray) -> np.ndarray:
        powers = np.exp(x - x.max(-1, keepdims=True))
        return powers / powers.sum(-1, keepdims=True) + 1e-8

    p, q = softmax(other), softmax(base)
    importance = np.abs(other - base) * (p * np.log(p / q)).sum(-1, keepdims=True)
    ordered = np.sort(importance.ravel())
    first, median, third = (ordered[int(s * (ordered.size - 1))] for s in (0.25, 0.5, 0.75))
    return np.where(importance >= median + 1.5 * (third - first), other, base)


def test_arcee_fusion() -> None:
    base, [model] = family(1)
    pair = [base["matrix"].double().numpy(), model["matrix"].double().numpy()]
    check("arcee_fusion", fused(*pair), base, [base, model])
    with pytest.raises(OptionError, match="takes a base and one other model, and here are 3"):
        merge([base, model, model], "arcee_fusion")["matrix"]


def test_arcee_fusion_of_a_large_tensor() -> None:
    base, [model] = family(1, shapes={"matrix": (3000, 450)})
    model["matrix"][:1500] = base["matrix"][:1500]  # many are equal, and rows differ much
    model["matrix"][1500:2000] += 0.5
    merged = merge([base, model], "arcee_fusion")["matrix"].double().numpy()
    expected = fused(base["matrix"].double().numpy(), model["matrix"].double().numpy())
    assert np.mean(merged != expected) < 1e-5  # of float32 rounding at the threshold


def test_nearswap() -> None:
    base, models = family(1)
    d = deltas(base, models)
    for t in (0.05, 1e-7):
        check("nearswap", (d * np.minimum(t / np.abs(d), 1))[0], base, models, t=t)
    assert torch.equal(merge(models, "nearswap", base=base, t=100)["matrix"], models[0]["matrix"])
    with pytest.raises(OptionError, match="t of nearswap is the largest change"):
        merge(models, "nearswap", base=base, t=-0.1)["matrix"]
