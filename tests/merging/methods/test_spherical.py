"""Great circles, against formulas in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers.merges import apply, check, deltas, family

from weightops.errors import OptionError
from weightops.merging.merge import merge


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
    with pytest.raises(OptionError, match="there are 3\nhint: nuslerp and karcher take any"):
        apply("slerp", base, [*models, models[0]])["matrix"]


def test_arcs_between_task_vectors() -> None:
    base, models = family(2)
    merged = merge(models, "slerp", base=base, t=0.3)["matrix"] - base["matrix"]
    x, y = (torch.from_numpy(d) for d in deltas(base, models))
    angle = math.acos(float((x * y).sum() / x.norm() / y.norm()))
    expected = (math.sin(0.7 * angle) * x + math.sin(0.3 * angle) * y) / math.sin(angle)
    assert torch.allclose(merged.double(), expected, atol=1e-5)


def test_multislerp() -> None:
    base, models = family(3)
    x = np.stack([m["matrix"].double().numpy() for m in models])
    norms, weights = np.linalg.norm(x, axis=(1, 2)), np.array([1, 2, 5]) / 8
    direction = np.einsum("i,ijk->jk", weights / norms, x)
    expected = direction / np.linalg.norm(direction) * (weights @ norms)
    check("multislerp", expected, base, models, weights=[1, 2, 5])
    assert torch.equal(apply("multislerp", base, models[:1])["matrix"], models[0]["matrix"])
    opposite = [models[0], {n: t if n == "ids" else -t for n, t in models[0].items()}]
    assert not apply("multislerp", base, opposite)["matrix"].any()
    third = {n: t if n == "ids" else 0 * t for n, t in models[0].items()}
    with pytest.raises(OptionError, match=r"sum to .*, less than epsilon"):
        apply("multislerp", base, [*opposite, third])["matrix"]
    with pytest.raises(OptionError, match="must not sum to 0"):
        apply("multislerp", base, models[:2], weights=[1, -1])["matrix"]
