"""RAM and RAM+, against formulas in float64."""

from __future__ import annotations

import numpy as np
from helpers.merges import check, deltas, family


def test_ram() -> None:
    base, models = family(3)
    d = deltas(base, models)
    changes = np.abs(d) > 0.1
    count = changes.sum(0)
    expected = (d * changes).sum(0) / np.maximum(count, 1)
    assert {0, 1, 2} <= set(count.ravel())
    check("ram", expected, base, models, epsilon=0.1)
    alone = changes & (count == 1)
    ratio = (changes & (count > 1)).sum((1, 2)) / alone.sum((1, 2))
    boosts = 1 + 0.5 * np.clip(ratio, 0, 0.8)
    boosted = np.where(count == 1, (d * alone * boosts[:, None, None]).sum(0), expected)
    check("ramplus_tl", boosted, base, models, r=0.5, limit=0.8, epsilon=0.1)
