"""SCE and TALL masks, against formulas in float64."""

from __future__ import annotations

import numpy as np
import torch
from helpers.merges import apply, check, deltas, family

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
    for select_topk, unselected in ((1.0, "drop"), (0.5, "drop"), (0.5, "merge")):
        variance = d.var(0)
        threshold = np.sort(variance.ravel())[-int(select_topk * variance.size)]
        selected = d * (variance >= threshold)
        energy = (selected**2).mean((1, 2))
        shares = energy / energy.sum()
        merged = selected if unselected == "drop" else d
        kept = (np.sign(merged) == np.sign(merged.sum(0))) * shares[:, None, None]
        expected = (kept * merged).sum(0) / kept.sum(0)
        check("sce", expected, base, models, select_topk=select_topk, unselected=unselected)


def test_small_updates_weigh_alike_where_asked() -> None:
    base, models = family(2)
    small = [{n: torch.lerp(base[n], m[n], 1e-3) for n in base if n != "ids"} for m in models]
    del base["ids"]
    d = deltas(base, small)
    sign = np.sign(d.sum(0))
    kept = np.sign(d) == sign
    expected = (kept * d).sum(0) / kept.sum(0)
    check("sce", expected, base, small, equal_below=1e-6, atol=1e-7)
    by_energy, alike = (apply("sce", base, small, equal_below=e)["matrix"] for e in (0, 1e-6))
    assert not torch.equal(by_energy, alike)
