"""WUDI and DOGE, against their losses by automatic differentiation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.merges import apply, check, deltas, family

from weightops.errors import OptionError
from weightops.merging.merge import merge

SHAPES = {"matrix": (12, 8), "vector": (33,), "positions": (5, 8)}


def loss(tau: torch.Tensor, tasks: torch.Tensor) -> torch.Tensor:
    """Return the authors' loss, in float64."""
    products = (tau - tasks) @ tasks.mT
    return (products.square() / tasks.square().sum((1, 2), keepdim=True)).sum()


@pytest.mark.parametrize("steps", [1, 40])
def test_adam_on_the_loss(steps: int) -> None:
    base, models = family(3, shapes=SHAPES)
    tasks = torch.from_numpy(deltas(base, models))
    tau = torch.nn.Parameter(tasks.sum(0))
    optimizer = torch.optim.Adam([tau], lr=1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(tau, tasks).backward()
        optimizer.step()
    check("wudi", tau.detach().numpy(), base, models, atol=1e-5, steps=steps, lr=1e-3)


def test_the_minimum() -> None:
    base, models = family(2, shapes=SHAPES)
    tasks = torch.from_numpy(deltas(base, models))
    merged = apply("wudi", base, models, solver="exact")["matrix"].double()
    tau = torch.nn.Parameter(merged - base["matrix"].double())
    least = loss(tau, tasks)
    least.backward()
    assert tau.grad.abs().max() < 1e-5 * tasks.abs().max()
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        other = tau.detach() + 0.01 * torch.randn(tau.shape, generator=generator)
        assert loss(other, tasks) > least
    alone = apply("wudi", base, models[:1], solver="exact")["matrix"]
    assert torch.allclose(alone, models[0]["matrix"], atol=1e-5)


def test_where_directions_are_empty_the_minimum_is_the_smallest() -> None:
    base, models = family(2, shapes=SHAPES)
    for model in models:
        model["matrix"][:, 3:] = base["matrix"][:, 3:]
    d = deltas(base, models)
    tasks = torch.from_numpy(d)
    norms = (d**2).sum((1, 2), keepdims=True)
    squares = (np.swapaxes(d, 1, 2) @ d / norms).sum(0)
    products = (d @ np.swapaxes(d, 1, 2) @ d / norms).sum(0)
    check("wudi", products @ np.linalg.pinv(squares), base, models, atol=1e-5, solver="exact")
    assert loss(tasks.sum(0), tasks) > 0


def test_what_is_not_optimised() -> None:
    base, models = family(2, shapes=SHAPES)
    own = {"optimized": {"matrix": True, "*": False}, "others": "none"}
    merged = merge(models, "wudi", base=base, **own)
    assert torch.equal(merged["vector"], base["vector"])
    assert torch.equal(merged["positions"], base["positions"])
    assert torch.equal(merged["matrix"], merge(models, "wudi", base=base)["matrix"])
    mean = sum(model["vector"] for model in models) / 2
    assert torch.allclose(merge(models, "wudi", base=base)["vector"], mean, atol=1e-6)


@pytest.mark.parametrize("method", ["wudi", "doge"])
@pytest.mark.parametrize("wrong", [{"steps": 0}, {"steps": -1}, {"lr": 0.0}, {"lr": -1e-5}])
def test_steps_go_somewhere(method: str, wrong: dict[str, float]) -> None:
    base, models = family(2, shapes=SHAPES)
    with pytest.raises(OptionError, match="Adam takes steps, at a rate above 0"):
        apply(method, base, models, **wrong)["matrix"]


def shared_projection(tasks: torch.Tensor, subspace: int) -> torch.Tensor:
    """Return the projection to the shared directions of DOGE."""
    rank = min(tasks.shape[1:])
    own = [np.linalg.svd(task)[0][:, : rank // len(tasks)] for task in tasks.numpy()]
    basis = np.linalg.svd(np.concatenate(own, axis=1))[0][:, : rank // subspace]
    return torch.from_numpy(basis @ basis.T)


def test_doge_is_projected_adam_on_its_loss() -> None:
    base, models = family(3, shapes=SHAPES)
    tasks = torch.from_numpy(deltas(base, models))
    scales = 0.5 / tasks.norm(dim=(1, 2), keepdim=True)
    shift = torch.nn.Parameter(torch.zeros_like(tasks[0]))
    optimizer = torch.optim.Adam([shift], lr=1e-3)
    projection = shared_projection(tasks, 3)
    for _ in range(20):
        optimizer.zero_grad()
        errors = tasks - (scales * (tasks + shift)).sum(0)
        (tasks * errors).sum(2).square().sum().backward()
        shift.grad -= projection @ shift.grad
        optimizer.step()
    count = int(0.4 * tasks[0].numel())
    least = tasks.abs().flatten(1).sort(descending=True).values[:, count - 1]
    kept = tasks.abs() >= least[:, None, None]
    expected = (scales * kept * (tasks + shift.detach())).sum(0)
    own = {"norm": 0.5, "subspace": 3, "steps": 20, "lr": 1e-3, "density": 0.4, "scope": "tensor"}
    check("doge", expected.numpy(), base, models, atol=1e-5, **own)


@pytest.mark.parametrize("subspace", [0, -6])
def test_doge_shares_some_directions(subspace: int) -> None:
    base, models = family(2, shapes=SHAPES)
    with pytest.raises(OptionError, match="subspace is a number to divide by"):
        apply("doge", base, models, subspace=subspace)["matrix"]


def test_doge_counts_the_largest_elements_of_the_model() -> None:
    base, models = family(2, shapes=SHAPES)
    for model in models:
        model["vector"] = base["vector"] + 100
    merged = merge(models, "doge", base=base, density=33 / (33 + 96 + 40 + 3), others="none")
    assert torch.equal(merged["matrix"], base["matrix"])
    assert torch.equal(merged["vector"], base["vector"])
    whole = merge(models, "doge", base=base, density=0.3, scope="tensor")
    assert not torch.equal(whole["matrix"], base["matrix"])
