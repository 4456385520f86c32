"""SCE and TALL masks, against formulas in float64."""

from __future__ import annotations

import numpy as np
from helpers.merges import check, deltas, family

from weightops.algebra.names import Each


def test_tall_masks() -> None:
    base, models = family(3)
    d = deltas(base, models)
    tall = d.sum(0) * ((np.abs(d) >= 0.4 * np.abs(d.sum(0) - d)).sum(0) >= 2)
    check("tall_consensus", tall, base, models)
    scales = np.array([0.2, 0.9, 2.0])[:, None, None]  # the authors choose one for each task
    own = d.sum(0) * ((np.abs(d) >= scales * np.abs(d.sum(0) - d)).sum(0) >= 2)
    check("tall_consensus", own, base, models, mask_scale=Each((0.2, 0.9, 2.0)))


def test_sce() -> None:
    base, models = family(3)
    d = deltas(base, models)
    for select_topk in (1.0, 0.5):
        variance = d.var(0)
        threshold = np.sort(variance.ravel())[-int(select_topk * variance.size)]
        selected = d * (variance >= threshold)
        energy = (selected**2).mean((1, 2))
        shares = energy / energy.sum()
        sign = np.sign(selected.sum(0))
        kept = (np.sign(selected) == sign) * shares[:, None, None]
        expected = (kept * selected).sum(0) / kept.sum(0)
        check("sce", expected, base, models, select_topk=select_topk)
