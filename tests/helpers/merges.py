"""Small families of models to merge, and checks of what they give."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from weightops import Checkpoint, open_checkpoint
from weightops.merging.merge import merge
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


def family(
    k: int,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    shapes: Mapping[str, tuple[int, ...]] = SHAPES,
) -> tuple[State, list[State]]:
    """Return a base and ``k`` models near to it, which also have an integer tensor."""
    generator = torch.Generator().manual_seed(seed)
    base = {
        name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()
    }
    models = [
        {
            name: (tensor + 0.1 * torch.randn(tensor.shape, generator=generator)).to(dtype)
            for name, tensor in base.items()
        }
        for _ in range(k)
    ]
    ids = {"ids": torch.arange(3)}
    return base | ids, [model | ids for model in models]


def apply(method: str, base: State, models: list[State], **options: Any) -> Checkpoint:
    """Merge models, with their base if the method works on deltas."""
    needed: dict[str, Any] = {"base": base} if METHODS[method].space == "delta" else {}
    if METHODS[method].statistics:
        needed["statistics"] = [
            {kind: statistic(kind, model, _seed_of(model)) for kind in METHODS[method].statistics}
            for model in models
        ]
    return merge(models, method, **needed, **options)


def _seed_of(model: State) -> int:
    """Return a seed that belongs to a model, wherever it stands among others."""
    return int(1e6 * next(iter(model.values())).double().abs().sum())


def statistic(kind: str, model: State, seed: int) -> State:
    """Return positive numbers of a model's shapes, or Gram matrices of random inputs."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, tensor in model.items():
        wide = torch.promote_types(tensor.dtype, torch.float32)
        if kind == "fisher" and tensor.is_floating_point():
            made[name] = torch.rand(tensor.shape, generator=generator, dtype=wide)
        elif kind == "gram" and tensor.is_floating_point() and tensor.dim() > 1:
            size = tensor[0].numel()
            inputs = torch.randn(4 * size, size, generator=generator, dtype=wide)
            made[name] = inputs.mT @ inputs / len(inputs)
    return made


def same(a: Checkpoint | State, b: Checkpoint | State) -> bool:
    """Return True if all floating-point tensors of two families are equal to the bit."""
    return all(torch.equal(a[name], b[name]) for name in SHAPES)


def deltas(base: State, models: list[State], name: str = "matrix") -> np.ndarray:
    """Return the task vectors at a tensor, in float64."""
    return np.stack([(model[name].double() - base[name].double()).numpy() for model in models])


def check(
    method: str,
    expected: np.ndarray,
    base: State,
    models: list[State],
    atol: float = 1e-6,
    **options: Any,
) -> None:
    """Check the result at "matrix" against an expected one: a delta, if the method gives deltas."""
    merged = apply(method, base, models, **options)["matrix"].double().numpy()
    start = base["matrix"].double().numpy() if METHODS[method].space == "delta" else 0
    np.testing.assert_allclose(merged, start + expected, atol=atol)


def same_files(a: Path, b: Path) -> bool:
    """Return True if two checkpoints hold the same tensors to the bit."""
    x, y = open_checkpoint(a), open_checkpoint(b)
    return x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)
