"""Trimming, TIES and Breadcrumbs, against formulas in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.merges import apply, check, deltas, family

from weightops.algebra.kernels import CHUNK
from weightops.algebra.names import Each
from weightops.merging.merge import merge


def plain_trim(delta: np.ndarray, keep: int) -> np.ndarray:
    order = np.argsort(-np.abs(delta).ravel(), kind="stable")
    out = np.zeros(delta.size)
    out[order[:keep]] = delta.ravel()[order[:keep]]
    return out.reshape(delta.shape)


def test_trimming_against_a_sort() -> None:
    base, models = family(3)
    d = deltas(base, models)
    w = np.array([0.5, 1.0, 2.0])
    t = np.stack([plain_trim(x, 12) for x in d])
    sign = np.sign((w[:, None, None] * t).sum(0))
    agree = (np.sign(t) == sign) & (t != 0)
    total = (agree * w[:, None, None] * t).sum(0)
    options = {"weights": list(w), "density": 0.5}
    check("magnitude", (w[:, None, None] * t).sum(0), base, models, **options)
    check("ties", total, base, models, normalize="none", **options)
    check("ties", total / np.maximum(agree.sum(0), 1), base, models, normalize="count", **options)
    divisor = (agree * w[:, None, None]).sum(0)
    mean = np.divide(total, divisor, out=np.zeros_like(total), where=divisor > 0)
    check("ties", mean, base, models, normalize="weights", **options)


def test_localized_elements_are_averaged() -> None:
    base, models = family(3)
    t = np.stack([plain_trim(x, 8) for x in deltas(base, models)])
    w = np.array([0.5, 1.0, 2.0])
    expected = (w[:, None, None] * t).sum(0) / np.maximum((t != 0).sum(0), 1)
    options = {"density": 8 / 24, "scope": "tensor", "weights": list(w)}
    check("localize_and_stitch", expected, base, models, **options)


def test_breadcrumbs_against_a_sort() -> None:
    base, models = family(3)
    crumbs = np.stack([plain_trim(x, 14) - plain_trim(x, 2) for x in deltas(base, models)])
    check("breadcrumbs", crumbs.sum(0), base, models, density=0.5, gamma=0.1)
    total = crumbs.sum(0)
    agreed = (crumbs * (np.sign(crumbs) == np.sign(total))).sum(0)
    check("breadcrumbs_ties", agreed, base, models, density=0.5, gamma=0.1)


def test_breadcrumbs_of_each_row() -> None:
    """A fraction of each row of the last dimension, rounded down; a single number stays."""
    base, models = family(2, shapes={"m": (6, 20), "conv": (3, 2, 4, 5), "v": (33,), "s": ()})
    options = {"density": Each((0.35, 0.5)), "gamma": 0.07, "scope": "row"}
    merged = merge(models, "breadcrumbs", base=base, **options)
    for name in ("m", "conv", "v", "s"):
        expected = base[name].double().numpy()
        for delta, density in zip(deltas(base, models, name), (0.35, 0.5), strict=True):
            rows = delta.reshape(-1, delta.shape[-1] if delta.shape else 1)
            n = rows.shape[1]
            first, kept = int(0.07 * n), int(density * n)
            crumbs = [plain_trim(row, first + kept) - plain_trim(row, first) for row in rows]
            expected = expected + (np.stack(crumbs).reshape(delta.shape) if delta.shape else delta)
        np.testing.assert_allclose(merged[name].double().numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("count", ["all", "changed"])
@pytest.mark.parametrize("density", [0.05, 0.3, 0.8])
def test_thresholds_over_the_whole_model(density: float, count: str) -> None:
    """A density is of all elements, a frozen tower's, too, or of those that a model changes.

    All that equal the smallest one count: in bfloat16 there are many.
    """
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (300, 400), "b": (77,), "c": (CHUNK + 5,)}
    base = {n: torch.randn(s, generator=generator).bfloat16() for n, s in shapes.items()}
    frozen = {"frozen": torch.randn(500, 500, generator=generator).bfloat16()}
    models = [
        {
            n: (t + scale * torch.randn(t.shape, generator=generator)).bfloat16()
            for n, t in base.items()
        }
        | frozen
        for scale in (0.1, 0.3)
    ]
    base |= frozen
    options = {"density": density, "scope": "global", "count": count}
    merged = merge(models[:1], "magnitude", base=base, **options)
    merged = merged.to(torch.float32)
    delta = torch.cat([(models[0][n].float() - base[n].float()).flatten() for n in base])
    changed, everything = int(density * int(delta.count_nonzero())), int(density * len(delta)) + 1
    number = changed if count == "changed" else everything
    least = delta.abs().sort(descending=True).values[number - 1]
    assert int((delta.abs() == least).sum()) > 1
    expected = delta * (delta.abs() >= least)
    kept = torch.cat([(merged[n] - base[n].float()).flatten() for n in base])
    assert torch.equal(kept, expected)
    by_model, by_tensor = (
        merge(models, "ties", base=base, density=density, scope=scope)["b"]
        for scope in ("global", "tensor")
    )
    assert not torch.equal(by_model, by_tensor)


def test_the_sum_of_magnitudes_is_restored() -> None:
    base, models = family(2)
    d = deltas(base, models)
    for method, kept in (("ties", {"normalize": "none"}), ("breadcrumbs", {"gamma": 0.1})):
        trimmed = [
            (apply(method, base, [m], density=0.5, **kept)["matrix"] - base["matrix"]).double()
            for m in models
        ]
        rescaled = [
            (apply(method, base, [m], density=0.5, rescale="l1", **kept)["matrix"]).double()
            for m in models
        ]
        for full, part, scaled in zip(d, trimmed, rescaled, strict=True):
            expected = part.numpy() * np.abs(full).sum() / np.abs(part.numpy()).sum()
            assert np.allclose(
                scaled.numpy() - base["matrix"].double().numpy(), expected, atol=1e-6
            )
