"""The engine: the same bits however the work is cut up."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from weightops import TaskVector, open_checkpoint
from weightops.engine.reduce import gram
from weightops.engine.run import SEGMENT, allocate, materialize, plan, units
from weightops.kernels import CHUNK


@pytest.fixture(scope="module")
def large() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Tensors that end within, at and just after a chunk and a segment."""
    generator = torch.Generator().manual_seed(0)
    sizes = [1, CHUNK - 1, CHUNK, CHUNK + 1, SEGMENT, SEGMENT + 7]
    pre = {f"w{n}": torch.randn(n, generator=generator) for n in sizes}
    return pre, {n: t + 0.1 * torch.randn(t.shape, generator=generator) for n, t in pre.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_and_files_agree_to_the_bit(
    large: tuple[dict[str, torch.Tensor], ...], dtype: torch.dtype, tmp_path: Path
) -> None:
    pre, ft = ({n: t.to(dtype) for n, t in state.items()} for state in large)
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
        assert all(torch.equal(tensor.view(torch.uint8), other[name].view(torch.uint8)) for other in results)


def test_an_element_does_not_depend_on_its_neighbours(large: tuple[dict[str, torch.Tensor], ...]) -> None:
    x, y, z = (state[f"w{CHUNK - 1}"] for state in (*large, large[1]))
    form = TaskVector({"w": x}, {"w": y}) + TaskVector({"w": x}, {"w": z * 1.5})
    whole = form.apply({"w": x}, 0.3)["w"]
    for start, stop in ((0, 1), (1, 4), (1000, 1077), (CHUNK - 9, CHUNK - 1)):
        a, b, c = x[start:stop], y[start:stop], z[start:stop]
        part = (TaskVector({"w": a}, {"w": b}) + TaskVector({"w": a}, {"w": c * 1.5})).apply({"w": a}, 0.3)["w"]
        assert torch.equal(part, whole[start:stop])


def test_units_cover_each_element_once(large: tuple[dict[str, torch.Tensor], ...]) -> None:
    form = open_checkpoint(large[0]).form
    covered: dict[str, list[tuple[int, int]]] = {}
    for batch in units(plan(form)):
        assert sum(s.stop - s.start for s in batch) < 2 * SEGMENT
        for segment in batch:
            covered.setdefault(segment.step.name, []).append((segment.start, segment.stop))
    for name, spans in covered.items():
        spans.sort()
        assert [a for a, _ in spans] == [0, *(b for _, b in spans)][:-1]
        assert spans[-1][1] == form.specs[name].numel


def test_gram_against_float64(large: tuple[dict[str, torch.Tensor], ...]) -> None:
    pre, ft = large
    half = {n: (t + pre[n]) / 2 for n, t in ft.items()}
    forms = [TaskVector(pre, ft).form, TaskVector(pre, half).form]
    for name, g in gram(forms).items():
        x, y = ft[name].double() - pre[name].double(), half[name].double() - pre[name].double()
        expected = torch.stack([torch.stack([x @ x, x @ y]), torch.stack([x @ y, y @ y])])
        assert torch.allclose(g, expected, rtol=1e-5)
        assert math.isclose(g[0, 1], g[1, 0])


def test_noncontiguous_and_half_precision_targets(large: tuple[dict[str, torch.Tensor], ...]) -> None:
    form = open_checkpoint({"m": torch.arange(12.0).view(3, 4)}).form
    out = torch.zeros(4, 3, dtype=torch.float16).T
    materialize(form, {"m": out})
    assert torch.equal(out, torch.arange(12.0).view(3, 4).half())


def test_many_segments_of_one_tensor() -> None:
    ones = {"w": torch.ones(3 * SEGMENT + 5), "v": torch.ones(3)}
    assert all(bool((t == 1).all()) for t in open_checkpoint(ones).state_dict().values())
