"""KnOTS and subspace boosting, against numpy's decompositions in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.merges import apply, check, deltas, family

from weightops.errors import OptionError, UnknownNameError
from weightops.merging.merge import merge


def trimmed(part: np.ndarray, keep: int) -> np.ndarray:
    order = np.argsort(-np.abs(part).ravel(), kind="stable")[:keep]
    out = np.zeros(part.size)
    out[order] = part.ravel()[order]
    return out.reshape(part.shape)


def test_aligned_parts_are_merged() -> None:
    base, models = family(3)
    d = deltas(base, models)
    u, s, vt = np.linalg.svd(np.concatenate(list(d), axis=1), full_matrices=False)
    parts = np.stack(np.split(vt, 3, axis=1))
    weights = np.array([1.0, 2.0, 0.5])
    kept = weights[:, None, None] * np.stack([trimmed(p, int(0.5 * p.size)) for p in parts])
    expected = (u * s) @ kept.sum(0)
    options = {"weights": list(weights), "then": "magnitude", "density": 0.5}
    check("knots", expected, base, models, atol=1e-5, **options)
    scaled = s[:, None] * parts
    kept = weights[:, None, None] * np.stack([trimmed(p, int(0.5 * p.size)) for p in scaled])
    check("knots", u @ kept.sum(0), base, models, atol=1e-5, scaled=True, **options)
    for same in (True, False):
        check("knots", d.sum(0), base, models, atol=1e-5, scaled=same, then="task_arithmetic")


def test_adapters_have_few_directions() -> None:
    """Rounding of float32 weights isn't taken for directions of an adapter."""
    generator = torch.Generator().manual_seed(0)
    base = {"w": torch.randn(40, 30, generator=generator)}
    models = []
    for _ in range(2):
        a, b = (torch.randn(size, generator=generator) for size in ((2, 30), (40, 2)))
        models.append({"w": base["w"] + b @ a})
    merged = merge(models, "knots", base=base, then="ties", density=1.0)["w"] - base["w"]
    values = torch.linalg.svdvals(merged.double())
    assert values[4] < 1e-5 * values[0] < values[3]


def test_small_singular_values_are_raised() -> None:
    base, models = family(2)
    u, s, vt = np.linalg.svd(deltas(base, models).sum(0), full_matrices=False)
    for beta in (0.01, 0.6, 0.9, 1.0):
        level = s[np.argmax(np.cumsum(s) >= beta * s.sum() - 1e-12)]
        expected = (u * np.maximum(s, level)) @ vt
        if beta < 1:  # at 1 rounding decides between the last two
            check("subspace_boosting", expected, base, models, atol=1e-5, beta=beta)
    plain = apply("ties", base, models, density=0.4)
    boosted = apply("subspace_boosting", base, models, then="ties", density=0.4)
    assert torch.equal(plain["vector"], boosted["vector"])


def test_matrices_of_a_tensor_are_raised_apart_or_left() -> None:
    base, models = family(2)
    plain = apply("task_arithmetic", base, models)["matrix"]
    left = apply("subspace_boosting", base, models, beta=0.9, spectral={"mat*": False})["matrix"]
    assert torch.equal(left, plain)
    whole = apply("subspace_boosting", base, models, beta=0.9, stacked=2)["matrix"]
    for half in (slice(3), slice(3, 6)):
        halves = [{"w": model["matrix"][half]} for model in models]
        alone = apply("subspace_boosting", {"w": base["matrix"][half]}, halves, beta=0.9)["w"]
        assert torch.allclose(whole[half], alone, atol=1e-6)


def test_refusals() -> None:
    base, models = family(2)
    for then in ("linear", "fisher", "knots"):
        with pytest.raises(OptionError, match=f"knots at .*: {then} isn't a method on task vec"):
            apply("knots", base, models, then=then)["matrix"]
    with pytest.raises(UnknownNameError, match="no merge method 'tise'"):
        apply("knots", base, models, then="tise")["matrix"]
    with pytest.raises(UnknownNameError, match="no merge method 'knot'") as caught:
        apply("knots", base, models, then="knot")["matrix"]
    assert "knots" not in caught.value.hint
    with pytest.raises(OptionError, match="tsv_m takes no weights"):
        apply("knots", base, models, then="tsv_m", weights=[1, 2])["matrix"]
