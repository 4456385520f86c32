"""Merge methods: properties of every one, and each against an independent formula in float64."""

from __future__ import annotations

import inspect
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from weightops import Checkpoint, open_checkpoint
from weightops.errors import MismatchError, OptionError, SpaceError, UnknownNameError, WeightopsError
from weightops.merging import merge
from weightops.methods.method import MethodSource
from weightops.methods.select import kth_magnitude, largest
from weightops.methods.table import METHODS

State = dict[str, torch.Tensor]
SHAPES = {
    "scalar": (),
    "one": (1,),
    "empty": (0,),
    "column": (8, 1),
    "matrix": (6, 4),
    "conv": (3, 2, 2, 2),
    "vector": (33,),
}
ON_DELTAS = [name for name, method in METHODS.items() if method.takes_deltas]
UNORDERED = {
    "linear",
    "task_arithmetic",
    "model_stock",
    "magnitude",
    "ties",
    "breadcrumbs",
    "breadcrumbs_ties",
    "sce",
    "tall_consensus",
    "karcher",
}


def family(k: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[State, list[State]]:
    generator = torch.Generator().manual_seed(seed)
    base = {n: torch.randn(s, generator=generator).to(dtype) for n, s in SHAPES.items()} | {"ids": torch.arange(3)}
    return base, [
        {
            n: (t + 0.1 * torch.randn(t.shape, generator=generator)).to(dtype) if n != "ids" else t
            for n, t in base.items()
        }
        for _ in range(k)
    ]


def apply(method: str, base: State, models: list[State], **options: object) -> Checkpoint:
    return merge(models, method, **({"base": base} if METHODS[method].takes_deltas else {}), **options)


def same(a: Checkpoint | State, b: Checkpoint | State) -> bool:
    return all(torch.equal(a[n], b[n]) for n in SHAPES)


@pytest.mark.parametrize("method", METHODS)
def test_inputs_equal_to_the_base_give_the_base(method: str) -> None:
    base, _ = family(0)
    merged = apply(method, base, [dict(base), dict(base)])
    for name in base:
        if method in ON_DELTAS:
            assert torch.equal(merged[name], base[name]), name
        else:
            assert torch.allclose(merged[name], base[name], atol=1e-6), name


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_shape_dtype_and_finiteness_are_kept(method: str, dtype: torch.dtype) -> None:
    base, models = family(2, dtype=dtype)
    before = [{n: t.clone() for n, t in state.items()} for state in (base, *models)]
    merged = apply(method, base, models).state_dict()
    for name, tensor in base.items():
        assert merged[name].shape == tensor.shape
        assert merged[name].dtype == tensor.dtype
        assert not merged[name].numel() or bool(torch.isfinite(merged[name].double()).all())
    assert all(torch.equal(a[n], b[n]) for a, b in zip(before, (base, *models), strict=True) for n in a)
    assert same(merged, apply(method, base, models))


@pytest.mark.parametrize("method", ON_DELTAS)
def test_alpha_zero_gives_the_base(method: str) -> None:
    base, models = family(3)
    assert same(apply(method, base, models, alpha=0), base)


@pytest.mark.parametrize("method", sorted(UNORDERED))
def test_order_does_not_matter(method: str) -> None:
    base, models = family(4)
    merged, shuffled = apply(method, base, models), apply(method, base, models[::-1])
    assert all(torch.allclose(merged[n], shuffled[n], atol=1e-6) for n in SHAPES)


@pytest.mark.parametrize("method", [n for n, m in METHODS.items() if "density" in m.options])
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_every_density(method: str, density: float) -> None:
    base, models = family(2)
    options = {"gamma": 0.0} if "gamma" in METHODS[method].options else {}
    options |= {"epsilon": 0.0} if "epsilon" in METHODS[method].options else {}
    merged = apply(method, base, models, density=density, **options)
    assert all(bool(torch.isfinite(merged[n]).all()) for n in SHAPES)
    if density == 0:
        assert same(merged, base)
    if density == 1 and "normalize" not in METHODS[method].options:
        expected = apply("task_arithmetic", base, models)
        assert all(torch.allclose(merged[n], expected[n], atol=1e-6) for n in SHAPES)
    with pytest.raises(OptionError, match="density is a fraction"):
        apply(method, base, models, density=1.5, **options)["matrix"]


@settings(max_examples=80, deadline=None)
@given(st.lists(st.one_of(st.just(0.0), st.floats(-1e4, 1e4, width=32)), min_size=1, max_size=200), st.data())
def test_kth_magnitude_is_exact(values: list[float], data: st.DataObject) -> None:
    tensor = torch.tensor(values)
    k = data.draw(st.integers(1, len(values)))
    assert kth_magnitude(tensor, k) == tensor.abs().sort(descending=True).values[k - 1]
    assert kth_magnitude(tensor.double(), k) == tensor.abs().sort(descending=True).values[k - 1]
    mask = largest(tensor, k)
    assert int(mask.sum()) == k
    if k < len(values):
        assert tensor[mask].abs().min() >= tensor[~mask].abs().max()


def deltas(base: State, models: list[State], name: str = "matrix") -> np.ndarray:
    return np.stack([(m[name].double() - base[name].double()).numpy() for m in models])


def check(
    method: str, expected: np.ndarray, base: State, models: list[State], atol: float = 1e-6, **options: object
) -> None:
    merged = apply(method, base, models, **options)["matrix"].double().numpy()
    start = base["matrix"].double().numpy() if METHODS[method].takes_deltas else 0
    np.testing.assert_allclose(merged, start + expected, atol=atol)


def plain_trim(delta: np.ndarray, keep: int) -> np.ndarray:
    order = np.argsort(-np.abs(delta).ravel(), kind="stable")
    out = np.zeros(delta.size)
    out[order[:keep]] = delta.ravel()[order[:keep]]
    return out.reshape(delta.shape)


def test_golden_sparse() -> None:
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
    check(
        "ties",
        np.divide(total, divisor, out=np.zeros_like(total), where=divisor > 0),
        base,
        models,
        normalize="weights",
        **options,
    )
    crumbs = np.stack([plain_trim(x, 14) - plain_trim(x, 2) for x in d])
    check("breadcrumbs", crumbs.sum(0), base, models, density=0.5, gamma=0.1)
    tall = d.sum(0) * ((np.abs(d) >= 0.4 * np.abs(d.sum(0) - d)).sum(0) >= 2)
    check("tall_consensus", tall, base, models)
    energy = (d**2).mean((1, 2))
    shares = energy / energy.sum()
    sign = np.sign((shares[:, None, None] * d).sum(0))
    kept = (np.sign(d) == sign) * shares[:, None, None]
    check("sce", (kept * d).sum(0) / kept.sum(0), base, models)


def test_golden_means() -> None:
    base, models = family(3)
    x = np.stack([m["matrix"].double().numpy() for m in models])
    check("linear", np.average(x, axis=0, weights=[1, 2, 5]), base, models, weights=[1, 2, 5])
    d = deltas(base, models)
    check("task_arithmetic", 0.3 * d[0] - d[1] + 2 * d[2], base, models, weights=[0.3, -1, 2])
    check("ema", 0.8 * (0.8 * x[0] + 0.2 * x[1]) + 0.2 * x[2], base, models, decay=0.8)
    check("passthrough", x[2], base, models, index=-1)
    unit = d.reshape(3, -1) / np.linalg.norm(d.reshape(3, -1), axis=1, keepdims=True)
    cosine = (unit @ unit.T)[np.triu_indices(3, 1)].mean()
    ratio = max(0.0, 3 * cosine / (1 + 2 * cosine))
    check("model_stock", ratio * d.mean(0), base, models)


def test_golden_spherical() -> None:
    base, models = family(2)
    x, y = (m["matrix"].double().numpy() for m in models)
    angle = math.acos((x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y))
    for t in (0.0, 0.3, 1.0):
        expected = (math.sin((1 - t) * angle) * x + math.sin(t * angle) * y) / math.sin(angle)
        check("slerp", expected, base, models, t=t, atol=1e-5)
        check("nuslerp", expected, base, models, weights=[1 - t, t], atol=1e-5)
    halfway = x / np.linalg.norm(x) + y / np.linalg.norm(y)
    norm = (np.linalg.norm(x) + np.linalg.norm(y)) / 2
    check("karcher", norm * halfway / np.linalg.norm(halfway), base, models, atol=1e-5)
    with pytest.raises(OptionError, match="nuslerp and karcher take more"):
        apply("slerp", base, [*models, models[0]])["matrix"]


def test_golden_spectral() -> None:
    base, models = family(2)
    d = deltas(base, models)
    u, s, vt = np.linalg.svd(d.sum(0), full_matrices=False)
    check("iso_c", s.mean() * u @ vt, base, models, atol=1e-5)
    parts = [np.linalg.svd(x, full_matrices=False) for x in d]
    left = np.concatenate([p[0][:, :2] for p in parts], 1)
    right = np.concatenate([p[2][:2] for p in parts], 0)
    polar = [a @ b for a, _, b in (np.linalg.svd(m, full_matrices=False) for m in (left, right))]
    check("tsv_m", polar[0] @ np.diag(np.concatenate([p[1][:2] for p in parts])) @ polar[1], base, models, atol=1e-5)
    whole = apply("iso_c", base, models, stacked=2)["matrix"].double().numpy() - base["matrix"].double().numpy()
    top = np.linalg.svd(d.sum(0)[:3], full_matrices=False)
    np.testing.assert_allclose(whole[:3], top[1].mean() * top[0] @ top[2], atol=1e-5)


def test_drop_at_random_keeps_the_expectation() -> None:
    base = {"w": torch.zeros(200_000)}
    models = [{"w": torch.ones(200_000)}]
    for method in ("dare_linear", "della_linear"):
        merged = merge(models, method, base=base, density=0.3)["w"]
        assert merged.mean().item() == pytest.approx(1.0, abs=0.02)
        assert 0.69 < (merged == 0).float().mean().item() < 0.71
    one, two = (merge(models, "dare_linear", base=base, seed=s)["w"] for s in (0, 1))
    assert not torch.equal(one, two)


def test_schema_and_refusals(net: nn.Module) -> None:
    base, models = family(2)
    assert METHODS["ties"].options["normalize"].choices == ("weights", "count", "none")
    assert METHODS["ties"].summary.startswith("TIES")
    for method in METHODS.values():
        assert method.summary
        assert all(
            f"\n        {name}: " in (method.function.__doc__ or "")
            for name in inspect.signature(method.function).parameters
        )
    with pytest.raises(UnknownNameError, match="no merge method 'tise'; did you mean ties"):
        merge(models, "tise")
    with pytest.raises(UnknownNameError, match="no option of ties 'densty'; did you mean density"):
        merge(models, "ties", base=base, densty=0.2)
    with pytest.raises(UnknownNameError, match="'weights' or 'count' or 'none', not 'mean'"):
        merge(models, "ties", base=base, normalize="mean")
    with pytest.raises(WeightopsError, match="say which base"):
        merge(models, "ties")
    with pytest.raises(WeightopsError, match="neither a base nor an alpha"):
        merge(models, "linear", base=base)
    with pytest.raises(MismatchError, match="don't match"):
        merge([models[0], net], "linear")
    with pytest.raises(WeightopsError, match="nothing to merge"):
        merge([])
    form = open_checkpoint(base).form
    with pytest.raises(SpaceError, match="merges task vectors"):
        MethodSource(METHODS["ties"], [form])


def test_saved_and_described(tmp_path: object) -> None:
    base, models = family(3)
    merged = merge(models, "dare_ties", base=base, alpha=0.5, seed=7)
    path = merged.save(f"{tmp_path}/merged.safetensors")
    again = open_checkpoint(path)
    assert same(again, merged)
    assert again.source.made_from["terms"][1]["method"] == "dare_ties"
    assert (path.read_bytes()) == merge(models, "dare_ties", base=base, alpha=0.5, seed=7).save(
        f"{tmp_path}/again.safetensors"
    ).read_bytes()
