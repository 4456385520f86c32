"""DARE and DELLA."""

from __future__ import annotations

import pytest
import torch
from helpers.merges import apply, family

from weightops.merging.merge import merge


def test_dropping_keeps_the_expectation() -> None:
    base = {"w": torch.zeros(200_000)}
    models = [{"w": torch.ones(200_000)}]
    for method in ("dare_linear", "della_linear"):
        merged = merge(models, method, base=base, density=0.3)["w"]
        assert merged.mean().item() == pytest.approx(1.0, abs=0.02)
        assert 0.69 < (merged == 0).float().mean().item() < 0.71
    one, two = (merge(models, "dare_linear", base=base, seed=seed)["w"] for seed in (0, 1))
    assert not torch.equal(one, two)


def test_della_keeps_all_at_density_one() -> None:
    base, models = family(2)
    merged = apply("della_linear", base, models, density=1.0)
    added = apply("task_arithmetic", base, models)
    assert all(torch.allclose(merged[name], added[name]) for name in added)


def test_large_elements_are_kept_more_often_by_rank() -> None:
    base = {"w": torch.zeros(2000, 100)}
    model = {"w": torch.arange(1.0, 101).expand(2000, 100)}
    merged = merge([model], "della_linear", base=base, density=0.5, epsilon=0.3, rescale="none")
    shares = (merged["w"] != 0).float().mean(0)
    assert torch.allclose(shares, torch.linspace(0.2, 0.8, 100), atol=0.06)


def test_sums_of_magnitudes_are_restored() -> None:
    base, models = family(1)
    for method in ("dare_linear", "della_linear"):
        merged = apply(method, base, models, density=0.5, rescale="l1")
        before, after = ((m["matrix"] - base["matrix"]).abs().sum() for m in (models[0], merged))
        assert torch.allclose(before, after, rtol=1e-4)
