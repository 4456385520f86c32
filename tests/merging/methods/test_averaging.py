"""Linear combinations, against formulas in float64."""

from __future__ import annotations

import numpy as np
from helpers.merges import check, deltas, family


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


def test_weights_that_are_divided_by_their_sum() -> None:
    base, models = family(2)
    d = deltas(base, models)
    for method in ("task_arithmetic", "dare_linear", "della_linear", "breadcrumbs"):
        kept = {} if method == "task_arithmetic" else {"density": 1.0}
        kept |= {"epsilon": 0.0} if method == "della_linear" else {}
        for weights, divisor in (([1, 3], 4), ([1, -1], 1)):
            expected = (weights[0] * d[0] + weights[1] * d[1]) / divisor
            check(method, expected, base, models, weights=weights, normalize="weights", **kept)


def test_the_floor_of_a_cosine() -> None:
    base, models = family(3)
    d = deltas(base, models).reshape(3, -1)
    floor = 10 * float(np.linalg.norm(d[0]) * np.linalg.norm(d[1]))
    cosine = (d @ d.T)[np.triu_indices(3, 1)].mean() / floor
    ratio = 3 * cosine / (1 + 2 * cosine)
    expected = ratio * deltas(base, models).mean(0)
    check("model_stock", expected, base, models, cosine_floor=floor)
