"""Singular vectors, against numpy's decompositions in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.merges import apply, check, deltas, family

from weightops.errors import OptionError
from weightops.merging.merge import merge
from weightops.merging.methods import spectral


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


@pytest.mark.parametrize("method", ["tsv_m", "iso_c", "iso_cts", "subspace_boosting"])
@pytest.mark.parametrize("stacked", [0, -1])
def test_no_matrices_are_refused(method: str, stacked: int) -> None:
    base, models = family(2)
    with pytest.raises(OptionError, match="at least 1"):
        apply(method, base, models, stacked=stacked)["matrix"]


@pytest.mark.parametrize(("k", "count", "own"), [(3, 16, 1), (3, 24, 2), (8, 24, 1)])
def test_directions_of_a_task_are_rounded(k: int, count: int, own: int) -> None:
    """Each task has ``round(rest / k)`` directions of its own, of which 16 leave 4 for 3 tasks."""
    base, models = family(k, shapes={"matrix": (count + 5, count)})
    d = deltas(base, models)
    shared = count - own * k
    u, s, vt = np.linalg.svd(d.sum(0), full_matrices=False)
    basis = u[:, :shared]
    parts = [np.linalg.svd(x - basis @ basis.T @ x, full_matrices=False) for x in d]
    left = np.concatenate([basis, *(p[0][:, :own] for p in parts)], 1)
    right = np.concatenate([vt[:shared], *(p[2][:own] for p in parts)], 0)
    polar = [a @ b for a, _, b in (np.linalg.svd(m, full_matrices=False) for m in (left, right))]
    level = np.concatenate([s[:shared], *(p[1][:own] for p in parts)]).mean()
    check("iso_cts", level * polar[0] @ polar[1], base, models, atol=1e-5)


def test_more_tasks_than_directions_leave_none_of_their_own() -> None:
    base, models = family(8, shapes={"matrix": (5, 16)})
    own, plain = (apply(m, base, models)["matrix"] for m in ("iso_cts", "iso_c"))
    torch.testing.assert_close(own, plain)
    without = apply("iso_cts", base, models, common=0.0)["matrix"]
    torch.testing.assert_close(without, plain)


@pytest.mark.parametrize("method", ["tsv_m", "iso_c", "iso_cts"])
@pytest.mark.parametrize("noise", [1.0, 1e-6])
def test_results_hardly_depend_on_threads(method: str, noise: float) -> None:
    """Nor does it matter that most directions are nearly empty, as in a merged adapter."""
    generator = torch.Generator().manual_seed(0)
    low = torch.randn(2, 96, 3, generator=generator) @ torch.randn(2, 3, 130, generator=generator)
    both = low + noise * torch.randn(2, 96, 130, generator=generator)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(getattr(spectral, method)(both.clone()))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert (results[0] - other).abs().max() <= 1e-6 * results[0].abs().max()


@pytest.mark.parametrize("method", ["tsv_m", "iso_c", "iso_cts"])
def test_directions_without_a_change_stay_without(method: str) -> None:
    base, models = family(2, shapes={"w": (12, 9)})
    for model in models:
        model["w"][:, 4:] = base["w"][:, 4:]
    merged = apply(method, base, models)["w"]
    assert torch.equal(merged[:, 4:], base["w"][:, 4:])
    assert not torch.equal(merged[:, :4], base["w"][:, :4])


def test_a_matrix_is_left_out_by_pattern() -> None:
    base, models = family(2, shapes={"w": (12, 9), "text_projection": (8, 8)})
    options = {"spectral": {"text_projection": False}}
    merged = merge(models, "iso_c", base=base, **options)
    mean = (models[0]["text_projection"] + models[1]["text_projection"]) / 2
    assert torch.allclose(merged["text_projection"], mean, atol=1e-6)
    assert torch.equal(merged["w"], merge(models, "iso_c", base=base)["w"])


def test_the_spectrum_of_one_model_is_flattened() -> None:
    base, models = family(1, shapes={"w": (12, 9)})
    delta = merge(models, "iso_c", base=base)["w"] - base["w"]
    own = np.linalg.svd(deltas(base, models, "w")[0], compute_uv=False)
    flat = np.linalg.svd(delta.numpy(), compute_uv=False)
    np.testing.assert_allclose(flat, np.full(9, own.mean()), rtol=1e-4)
