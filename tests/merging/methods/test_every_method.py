"""Properties that every merge method has."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from helpers.fake_device import THERE, Device
from helpers.merges import SHAPES, State, apply, family, same

from weightops import open_checkpoint
from weightops.algebra.kernels import CHUNK
from weightops.algebra.scratch import Scratch
from weightops.engine import threads
from weightops.errors import OptionError
from weightops.merging.methods.source import MethodSource
from weightops.merging.methods.table import METHODS

ON_DELTAS = [name for name, method in METHODS.items() if method.space == "delta"]


UNORDERED = {
    "linear",
    "task_arithmetic",
    "model_stock",
    "magnitude",
    "ties",
    "localize_and_stitch",
    "breadcrumbs",
    "breadcrumbs_ties",
    "sce",
    "tall_consensus",
    "karcher",
    "fisher",
    "wudi",
    "regmean",
}


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
def test_inputs_of_several_dtypes_are_widened(
    method: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Base and models of other dtypes give what they give in float32, as the first's dtype."""
    base, models = family(2)
    base = _cast(base, torch.float16)
    models = [_cast(models[0], torch.float32), _cast(models[1], torch.bfloat16)]
    merged = apply(method, base, models)
    assert "other dtypes" in caplog.text
    wide = apply(method, *_widened(base, models))
    first = base if method in ON_DELTAS else models[0]
    for name in SHAPES:
        assert merged[name].dtype == first[name].dtype
        expected = wide[name].to(first[name].dtype)
        assert torch.allclose(merged[name], expected, rtol=1e-3, atol=1e-6), name


def _widened(base: State, models: list[State]) -> tuple[State, list[State]]:
    return _cast(base, torch.float32), [_cast(model, torch.float32) for model in models]


def _cast(state: State, dtype: torch.dtype) -> State:
    return {n: t.to(dtype) if t.is_floating_point() else t for n, t in state.items()}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nonfinite_values_are_kept(
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


@pytest.mark.parametrize("method", [n for n, m in METHODS.items() if m.kind == "whole"])
def test_whole_tensors_hardly_depend_on_threads(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, models = family(2, shapes={"matrix": (96, 130)})
    results = []
    for count in (1, 2, 3):
        monkeypatch.setattr(threads, "_torch_threads", lambda count=count: count)
        results.append(apply(method, base, models)["matrix"])
    for other in results[1:]:
        assert (results[0] - other).abs().max() <= 1e-6 * results[0].abs().max()


@pytest.mark.parametrize("method", [n for n, m in METHODS.items() if "density" in m.options])
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_every_density(method: str, density: float) -> None:
    base, models = family(2)
    options = {"gamma": 0.0} if "gamma" in METHODS[method].options else {}
    options |= {"epsilon": 0.0} if "epsilon" in METHODS[method].options else {}
    options |= {"others": "none"} if "others" in METHODS[method].options else {}
    merged = apply(method, base, models, density=density, **options)
    assert all(bool(torch.isfinite(merged[n]).all()) for n in SHAPES)
    if density == 0 and "then" not in METHODS[method].options:
        assert same(merged, base)
    options_of = METHODS[method].options
    averages = {"normalize", "then", "norm"} & options_of.keys() or method == "localize_and_stitch"
    if density == 1 and not averages:
        expected = apply("task_arithmetic", base, models)
        assert all(torch.allclose(merged[n], expected[n], atol=1e-6) for n in SHAPES)
    if "then" in METHODS[method].options:
        options["then"] = "magnitude"
    with pytest.raises(OptionError, match="density is a fraction"):
        apply(method, base, models, density=1.5, **options)["matrix"]


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
    for name in base:
        assert torch.equal(whole[name], saved[name])
        assert torch.equal(whole[name], merged[name])
    if METHODS[method].space == "weights" and not METHODS[method].fixed:
        elements = merged.source.open("a", Scratch())
        parts = [
            elements(start, min(start + 12_345, whole["a"].numel())).clone()
            for start in range(0, whole["a"].numel(), 12_345)
        ]
        assert torch.equal(torch.cat(parts).bfloat16(), whole["a"].flatten())


@pytest.mark.parametrize("method", [name for name in METHODS if not METHODS[name].fixed])
def test_all_of_a_method_is_computed_on_the_device(method: str) -> None:
    """No operation mixes tensors of two devices; the results are the CPU's, which computes them."""
    base, models = family(2, seed=1, shapes={"matrix": (24, 50), "long": (70_000,)})
    [source] = [s for s in apply(method, base, models).form.sources if isinstance(s, MethodSource)]
    for name in source.specs:
        here = source.read(name).flatten()
        with Device():
            there = source.open(name, Scratch(THERE))(0, len(here))
        assert there.device == THERE
        assert torch.equal(there.inner, here)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("method", METHODS)
def test_files_computed_on_cuda(method: str, tmp_path: Path) -> None:
    base, models = family(2, seed=1, shapes={"matrix": (24, 50), "long": (70_000,)})
    merged = apply(method, base, models)
    saved = open_checkpoint(merged.save(tmp_path / "merged.safetensors", device="cuda"))
    assert all(torch.allclose(saved[name], merged[name], rtol=1e-4, atol=1e-5) for name in base)
