"""Merge methods: properties of every one, and each against an independent formula in float64."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.fake_device import THERE, Device
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from weightops import Checkpoint, TaskVector, open_checkpoint
from weightops.algebra.kernels import CHUNK
from weightops.algebra.names import Each, depths
from weightops.algebra.scratch import Scratch
from weightops.errors import (
    MismatchError,
    OptionError,
    SpaceError,
    UnknownNameError,
    WeightopsError,
)
from weightops.merging.merge import merge
from weightops.merging.methods.inputs import TensorInputs
from weightops.merging.methods.kept_elements import cutoffs
from weightops.merging.methods.source import MethodSource
from weightops.merging.methods.table import METHODS

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
ON_DELTAS = [name for name, method in METHODS.items() if method.space == "delta"]
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
    base = {n: torch.randn(s, generator=generator).to(dtype) for n, s in SHAPES.items()} | {
        "ids": torch.arange(3)
    }
    return base, [
        {
            n: (t + 0.1 * torch.randn(t.shape, generator=generator)).to(dtype) if n != "ids" else t
            for n, t in base.items()
        }
        for _ in range(k)
    ]


def apply(method: str, base: State, models: list[State], **options: object) -> Checkpoint:
    return merge(
        models, method, **({"base": base} if METHODS[method].space == "delta" else {}), **options
    )


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
    assert all(
        torch.equal(a[n], b[n]) for a, b in zip(before, (base, *models), strict=True) for n in a
    )
    assert same(merged, apply(method, base, models))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_not_lost(
    method: str, value: float, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    base, models = family(2)
    models[0]["matrix"][1, 2] = value
    merged = apply(method, base, models)
    assert not torch.isfinite(merged["matrix"]).all()
    merged.save(tmp_path / "x.safetensors")
    assert "NaN or Inf in 1 tensor: matrix" in caplog.text


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


def parts_of(*rows: torch.Tensor) -> TensorInputs:
    def read(start: int, stop: int, out: Sequence[torch.Tensor]) -> None:
        for row, part in zip(rows, out, strict=True):
            part.copy_(row[start:stop])

    return TensorInputs(
        read,
        len(rows),
        tuple(rows[0].shape),
        rows[0].dtype,
        Scratch(),
        by_rows=False,
        seed=0,
        name="",
    )


def kept(parts: TensorInputs, counts: list[int], of_nonzero: bool = False) -> list[torch.Tensor]:
    """The masks of each count, of the first row."""
    found = cutoffs(parts, lambda row, n: counts, of_nonzero=of_nonzero)[0]
    masks = []
    for limit in found:
        flags = torch.cat([limit.flags(c.values[0].abs(), c.start) for c in parts])
        trimmed = torch.cat([limit.keep(c.values[0].clone(), c.start) for c in parts])
        assert torch.equal(trimmed, flags * torch.cat([c.values[0].clone() for c in parts]))
        masks.append(flags.bool())
    return masks


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.one_of(st.just(0.0), st.floats(-1e4, 1e4, width=32)), min_size=1, max_size=200),
    st.data(),
)
def test_the_largest_are_exact(values: list[float], data: st.DataObject) -> None:
    tensor = torch.tensor(values)
    k = data.draw(st.integers(0, len(values)))
    for rows in (tensor, tensor.double()):
        [mask] = kept(parts_of(rows), [k])
        expected = torch.zeros_like(mask)
        expected[tensor.abs().sort(descending=True, stable=True).indices[:k]] = True
        assert torch.equal(mask, expected)


@pytest.mark.parametrize("kind", ["normal", "ties", "zeros", "sorted", "constant", "misleading"])
def test_the_largest_of_many_chunks(kind: str) -> None:
    n = 5 * CHUNK + 77
    tensor = torch.randn(n, generator=torch.Generator().manual_seed(0))
    if kind == "ties":
        tensor = tensor.bfloat16().float()
    elif kind == "zeros":
        tensor *= torch.rand(n) < 0.3
    elif kind == "sorted":
        tensor = tensor.sort().values
    elif kind == "constant":
        tensor.fill_(2.0)
    elif kind == "misleading":  # the blocks that are sampled are unlike the rest
        for start in np.linspace(0, n - 1024, 32).astype(int):
            tensor[start : start + 1024] *= 100
    order = tensor.abs().sort(descending=True, stable=True).indices
    counts = [1, n // 100, n // 5, n // 2, n - 5, n]
    parts = parts_of(tensor, tensor)
    both = zip(kept(parts, counts), kept(parts, counts, of_nonzero=True), strict=True)
    for count, (mask, again) in zip(counts, both, strict=True):
        assert torch.equal(mask, again)
        expected = torch.zeros(n, dtype=torch.bool)
        expected[order[:count]] = True
        assert torch.equal(mask, expected), count


def deltas(base: State, models: list[State], name: str = "matrix") -> np.ndarray:
    return np.stack([(m[name].double() - base[name].double()).numpy() for m in models])


def check(
    method: str,
    expected: np.ndarray,
    base: State,
    models: list[State],
    atol: float = 1e-6,
    **options: object,
) -> None:
    merged = apply(method, base, models, **options)["matrix"].double().numpy()
    start = base["matrix"].double().numpy() if METHODS[method].space == "delta" else 0
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
    sign = np.sign(d.sum(0))
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
    with pytest.raises(WeightopsError, match="say which base it is taken from"):
        merge(models, "linear", alpha=0.5)
    with pytest.raises(UnknownNameError, match="no tensor that matches 'matrxi'"):
        merge(models, "ties", base=base, density={"matrxi": 0.5})
    with pytest.raises(OptionError, match="density of ties is a finite number, not 'a'"):
        merge(models, "ties", base=base, density=["a"])
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


@pytest.mark.parametrize("method", METHODS)
def test_chunks_files_and_memory_agree_to_the_bit(method: str, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    shape = (40, 3 * CHUNK // 40 + 7) if METHODS[method].kind != "whole" else (24, 50)
    base = {
        "a": torch.randn(shape, generator=generator).bfloat16(),
        "b": torch.randn(33, generator=generator),
    }
    models = [
        {
            n: t + 0.1 * torch.randn(t.shape, generator=generator).to(t.dtype)
            for n, t in base.items()
        }
        for _ in range(2)
    ]
    merged = apply(method, base, models)
    whole = merged.state_dict()
    saved = open_checkpoint(merged.save(tmp_path / "merged.safetensors"))
    one = (
        merged.source.open("a", Scratch())
        if METHODS[method].space == "weights" and not METHODS[method].fixed
        else None
    )
    for name in base:
        assert torch.equal(whole[name], saved[name])
        assert torch.equal(whole[name], merged[name])
    if one is not None:
        parts = [
            one(start, min(start + 12_345, whole["a"].numel())).clone()
            for start in range(0, whole["a"].numel(), 12_345)
        ]
        assert torch.equal(torch.cat(parts).bfloat16(), whole["a"].flatten())


@pytest.mark.parametrize("method", [name for name in METHODS if not METHODS[name].fixed])
def test_all_of_a_method_is_computed_on_the_device(method: str) -> None:
    """Nothing of it mixes tensors of two devices. What it gives is what it gives on CPU, as this device is a CPU in disguise."""
    generator = torch.Generator().manual_seed(1)
    base = {
        "matrix": torch.randn(24, 50, generator=generator),
        "long": torch.randn(70_000, generator=generator),
    }
    models = [
        {n: t + 0.1 * torch.randn(t.shape, generator=generator) for n, t in base.items()}
        for _ in range(2)
    ]
    [source] = [s for s in apply(method, base, models).form.sources if isinstance(s, MethodSource)]
    for name in base:
        here = source.read(name).flatten()
        with Device():
            there = source.open(name, Scratch(THERE))(0, len(here))
        assert there.device == THERE
        assert torch.equal(there.inner, here)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("method", METHODS)
def test_files_computed_on_cuda(method: str, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    base = {
        "matrix": torch.randn(24, 50, generator=generator),
        "long": torch.randn(70_000, generator=generator),
    }
    models = [
        {n: t + 0.1 * torch.randn(t.shape, generator=generator) for n, t in base.items()}
        for _ in range(2)
    ]
    merged = apply(method, base, models)
    saved = open_checkpoint(merged.save(tmp_path / "merged.safetensors", device="cuda"))
    assert all(torch.allclose(saved[name], merged[name], rtol=1e-4, atol=1e-5) for name in base)


def test_settings_by_pattern_and_depth() -> None:
    names = ["embed.weight", "layers.0.w", "layers.1.w", "layers.2.w", "head.weight"]
    base = {name: torch.zeros(4) for name in names}
    models = [{name: torch.ones(4) for name in names}]
    lines = merge(models, "task_arithmetic", base=base, alpha=[0.1, 0.5])
    assert [round(lines[n][0].item(), 6) for n in names] == [0.1, 0.1, 0.3, 0.5, 0.5]
    named = merge(models, "task_arithmetic", base=base, weights=[{"layers.*": [1, 3], "head.*": 7}])
    assert [named[n][0].item() for n in names] == [1, 1, 2, 3, 7]
    both = merge(models * 2, "magnitude", base=base, density=Each((0.25, 1.0)))
    assert [int(both[n].sum()) for n in names] == [5] * 5
    with pytest.raises(
        OptionError, match=r"magnitude at embed\.weight: there are 1 inputs, and values for 2"
    ):
        merge(models, "magnitude", base=base, density=Each((0.25, 1.0)))["embed.weight"]
    some = merge(models, "magnitude", base=base, density={"layers.1.w": 0.5, "*": 1.0})
    assert [int(some[n].sum()) for n in names] == [4, 4, 2, 4, 4]


@pytest.mark.parametrize("method", sorted(METHODS))
def test_tied_weights_stay_tied(method: str, tmp_path: Path) -> None:
    def model(seed: int) -> State:
        shared = torch.randn(6, 4, generator=torch.Generator().manual_seed(seed))
        return {"head.weight": shared, "inside.weight": shared, "w": shared + 1}

    merged = apply(method, model(0), [model(1), model(2)])
    state = merged.state_dict()
    assert state["head.weight"].data_ptr() == state["inside.weight"].data_ptr()
    saved = open_checkpoint(merged.save(tmp_path / "x.safetensors"))
    assert all(torch.equal(saved[name], state[name]) for name in state)


def test_what_a_method_cannot_take() -> None:
    base, models = family(2)
    for method, options, error, match in (
        ("tsv_m", {"weights": [1, 2]}, OptionError, "tsv_m takes no weights"),
        ("ties", {"density": "0.2"}, OptionError, "density of ties is a finite number, not '0.2'"),
        ("ties", {"density": None}, OptionError, "not None"),
        ("ties", {"normalize": {"*": "weigths"}}, UnknownNameError, "not 'weigths'"),
        ("linear", {"normalize": "no"}, OptionError, "true or false, not 'no'"),
        ("della", {"density": 0.95, "epsilon": 0.1}, OptionError, "outside of 0 to 1"),
        ("dare_linear", {"density": 1e-6}, OptionError, "keeps nothing"),
    ):
        with pytest.raises(error, match=match):
            merge(models, method, base=None if method == "linear" else base, **options)["matrix"]
    kept = merge(models, "ties", base=base, density=np.float32(0.5))
    assert json.dumps(kept.form.sources[1].describe())
    one, two = (
        TaskVector(base, model).select(names)
        for model, names in zip(models, ("matrix", "*"), strict=True)
    )
    with pytest.raises(MismatchError, match="ties takes inputs with the same tensors"):
        MethodSource(METHODS["ties"], [one.form, two.form])
    with pytest.raises(MismatchError, match="float8_e4m3fn tensors, which can't be edited: w"):
        TaskVector({"w": torch.zeros(4)}, {"w": torch.ones(4)}).apply(
            {"w": torch.ones(4).to(torch.float8_e4m3fn)}, 0.5
        )


def test_della_keeps_all_at_density_one() -> None:
    base, models = family(2)
    merged = apply("della_linear", base, models, density=1.0)
    added = apply("task_arithmetic", base, models)
    assert all(torch.allclose(merged[name], added[name]) for name in added)


def test_depth_is_within_the_layers_that_there_are() -> None:
    assert depths([f"layers.{i}.w" for i in (2, 3, 4)]) == {
        "layers.2.w": 0.0,
        "layers.3.w": 0.5,
        "layers.4.w": 1.0,
    }


def test_arcs_between_task_vectors() -> None:
    base, models = family(2)
    merged = merge(models, "slerp", base=base, t=0.3)["matrix"] - base["matrix"]
    x, y = (torch.from_numpy(d) for d in deltas(base, models))
    angle = math.acos(float((x * y).sum() / x.norm() / y.norm()))
    expected = (math.sin(0.7 * angle) * x + math.sin(0.3 * angle) * y) / math.sin(angle)
    assert torch.allclose(merged.double(), expected, atol=1e-5)


@pytest.mark.parametrize("density", [0.05, 0.3, 0.8])
def test_thresholds_over_the_whole_vector(density: float) -> None:
    """Of what has changed: a frozen tower doesn't count."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (300, 400), "b": (77,), "c": (CHUNK + 5,), "frozen": (500, 500)}
    base = {n: torch.randn(s, generator=generator).bfloat16() for n, s in shapes.items()}
    models = [
        {
            n: (t + scale * torch.randn(t.shape, generator=generator)).bfloat16()
            if n != "frozen"
            else t
            for n, t in base.items()
        }
        for scale in (0.1, 0.3)
    ]
    merged = merge(models[:1], "magnitude", base=base, density=density, scope="global").to(
        torch.float32
    )
    names = list(shapes)
    delta = torch.cat([(models[0][n].float() - base[n].float()).flatten() for n in names])
    order = (
        delta.abs()
        .sort(descending=True, stable=True)
        .indices[: int(density * int(delta.count_nonzero()))]
    )
    expected = torch.zeros_like(delta)
    expected[order] = delta[order]
    kept = torch.cat([(merged[n] - base[n].float()).flatten() for n in names])
    assert torch.equal(kept, expected)
    whole, tensor = (
        merge(models, "ties", base=base, density=density, scope=s)["b"]
        for s in ("global", "tensor")
    )
    assert not torch.equal(whole, tensor)
