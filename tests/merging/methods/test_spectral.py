"""Singular vectors, against numpy's decompositions in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.merges import apply, check, deltas, family


def test_golden_spectral() -> None:
    base, models = family(2)
    d = deltas(base, models)
    u, s, vt = np.linalg.svd(d.sum(0), full_matrices=False)
    check("iso_c", s.mean() * u @ vt, base, models, atol=1e-5)
    parts = [np.linalg.svd(x, full_matrices=False) for x in d]
    left = np.concatenate([p[0][:, :2] for p in parts], 1)
    right = np.concatenate([p[2][:2] for p in parts], 0)
    polar = [a @ b for a, _, b in (np.linalg.svd(m, full_matrices=False) for m in (left, right))]
    check(
        "tsv_m",
        polar[0] @ np.diag(np.concatenate([p[1][:2] for p in parts])) @ polar[1],
        base,
        models,
        atol=1e-5,
    )
    basis = u[:, :2]  # half of four directions are common, and each task has one of its own
    own = [np.linalg.svd(x - basis @ basis.T @ x, full_matrices=False) for x in d]
    left = np.concatenate([basis, *(p[0][:, :1] for p in own)], 1)
    right = np.concatenate([vt[:2], *(p[2][:1] for p in own)], 0)
    polar = [a @ b for a, _, b in (np.linalg.svd(m, full_matrices=False) for m in (left, right))]
    level = np.mean([*s[:2], *(p[1][0] for p in own)])
    check("iso_cts", level * polar[0] @ polar[1], base, models, atol=1e-5, common=0.5)


@pytest.mark.parametrize("method", ["tsv_m", "iso_c", "iso_cts"])
def test_stacked_matrices_are_merged_apart(method: str) -> None:
    base, models = family(2)
    whole = apply(method, base, models, stacked=2)["matrix"]
    for half in (slice(3), slice(3, 6)):
        alone = apply(
            method, {"w": base["matrix"][half]}, [{"w": m["matrix"][half]} for m in models]
        )["w"]
        assert torch.allclose(whole[half], alone, atol=1e-6)
