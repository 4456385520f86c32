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
