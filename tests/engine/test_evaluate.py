"""Evaluation: the same bits however the work is divided."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.large_models import large_models

from weightops import TaskVector, open_checkpoint
from weightops.algebra.kernels import CHUNK
from weightops.engine.evaluate import allocate, materialize
from weightops.engine.plan import SEGMENT


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_and_files_agree_to_the_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    pre, ft = ({n: t.to(dtype) for n, t in state.items()} for state in large_models())
    edited = TaskVector(pre, ft).apply(open_checkpoint(pre), 0.3)
    results = []
    for threads in (1, 2, 5):
        out = allocate(edited.form)
        materialize(edited.form, out, threads=threads)
        results.append(out)
    results.append(open_checkpoint(edited.save(tmp_path / "x.safetensors")).state_dict())
    results.append({name: edited[name] for name in edited})
    ulp = torch.finfo(dtype).eps
    for name, tensor in results[0].items():
        plain = pre[name].double() + (ft[name].double() - pre[name].double()) * 0.3
        assert bool(((tensor.double() - plain).abs() <= plain.abs() * ulp / 2 + 1e-7).all())
        assert all(
            torch.equal(tensor.view(torch.uint8), other[name].view(torch.uint8))
            for other in results
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "alphas", [(0.3, 0.3, 0.3), (0.4, -0.7, 1.5), (-0.2, -0.3, -1.0), (1.0, -1.0, 0.5)]
)
def test_several_terms_of_both_signs(
    dtype: torch.dtype, alphas: tuple[float, ...], tmp_path: Path
) -> None:
    pre, ft = ({n: t.to(dtype) for n, t in state.items()} for state in large_models())
    tuned = [{n: (t.float() * (1 + 0.01 * i)).to(dtype) for n, t in ft.items()} for i in range(3)]
    for model in tuned:
        for name, tensor in model.items():
            tensor[::3] = pre[name][::3]  # what is equal in all
    vector = sum(alpha * TaskVector(pre, model) for alpha, model in zip(alphas, tuned, strict=True))
    assert isinstance(vector, TaskVector)
    edited = vector.apply(open_checkpoint(pre))
    out = edited.state_dict()
    again = open_checkpoint(edited.save(tmp_path / "x.safetensors")).state_dict()
    ulp = torch.finfo(dtype).eps
    for name, tensor in out.items():
        assert torch.equal(tensor, again[name])
        assert torch.equal(tensor[::3], pre[name][::3])
        shifts = [
            alpha * (m[name].double() - pre[name].double())
            for alpha, m in zip(alphas, tuned, strict=True)
        ]
        plain = pre[name].double() + sum(shifts)
        assert bool(((tensor.double() - plain).abs() <= plain.abs() * ulp / 2 + 1e-6).all())
        delta = sum(shifts)
        assert torch.allclose(vector[name].double(), delta, rtol=2 * ulp, atol=1e-6)


def test_what_cancels_is_nothing() -> None:
    pre, ft = large_models()
    other = {n: t + 1.0 for n, t in pre.items()}
    frozen = TaskVector(pre, pre) + TaskVector(other, other)
    for name in pre:
        assert not frozen[name].any()
        assert torch.equal(frozen.apply(ft, 1.0)[name], ft[name])
        assert torch.equal(
            (TaskVector(pre, ft) - TaskVector(pre, ft)).apply(other)[name], other[name]
        )


def test_a_sum_of_vectors_is_as_precise_as_its_terms() -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(10_000, generator=generator)
    models = [base + 2e-5 * torch.randn(10_000, generator=generator) for _ in range(8)]
    total = sum(0.3 * TaskVector({"w": base}, {"w": model}) for model in models)
    assert isinstance(total, TaskVector)
    plain = 0.3 * sum(model.double() - base.double() for model in models)
    assert float((total["w"].double() - plain).norm() / plain.norm()) < 1e-6
    applied = total.apply({"w": base})["w"].double()
    assert (
        float((applied - (base.double() + plain)).abs().max())
        <= torch.finfo(torch.float32).eps * float(base.abs().max()) / 2 * 1.01
    )


def test_an_element_does_not_depend_on_its_neighbours() -> None:
    x, y, z = (state[f"w{CHUNK - 1}"] for state in (*large_models(), large_models()[1]))
    form = TaskVector({"w": x}, {"w": y}) + TaskVector({"w": x}, {"w": z * 1.5})
    whole = form.apply({"w": x}, 0.3)["w"]
    for start, stop in ((0, 1), (1, 4), (1000, 1077), (CHUNK - 9, CHUNK - 1)):
        a, b, c = x[start:stop], y[start:stop], z[start:stop]
        part = (TaskVector({"w": a}, {"w": b}) + TaskVector({"w": a}, {"w": c * 1.5})).apply(
            {"w": a}, 0.3
        )["w"]
        assert torch.equal(part, whole[start:stop])


def test_noncontiguous_and_half_precision_targets() -> None:
    form = open_checkpoint({"m": torch.arange(12.0).view(3, 4)}).form
    out = torch.zeros(4, 3, dtype=torch.float16).T
    materialize(form, {"m": out})
    assert torch.equal(out, torch.arange(12.0).view(3, 4).half())


def test_many_segments_of_one_tensor() -> None:
    ones = {"w": torch.ones(3 * SEGMENT + 5), "v": torch.ones(3)}
    assert all(bool((t == 1).all()) for t in open_checkpoint(ones).state_dict().values())
