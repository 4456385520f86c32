"""CMA-ES on a score whose coefficients depend on each other."""

from __future__ import annotations

import pytest
import torch

from weightops.search.cma_es import evolve
from weightops.search.goal import Goal
from weightops.search.measurements import Measurements, image_count


def test_evolution_along_a_ridge() -> None:
    """Two coefficients must change together, and a third lowers the kept accuracy."""
    n = 2000
    luck = torch.rand(2, n, generator=torch.Generator().manual_seed(0))
    shares: list[float] = []

    def measure(alpha: tuple[float, ...], start: float, stop: float) -> dict[str, torch.Tensor]:
        a, b, c = alpha
        score = 0.95 - 0.1 * (a + b - 1.4) ** 2 - 1.5 * (a - b - 0.4) ** 2 - 0.2 * (c - 0.6) ** 2
        kept = 0.9 - 0.2 * max(c - 0.3, 0.0)
        shares.append(stop - start)
        images = slice(image_count(n, start), image_count(n, stop))
        return {"t": luck[0, images] < score, "k": luck[1, images] < kept}

    def search() -> tuple[tuple[float, ...], str]:
        measurements = Measurements(
            measure, Goal({"t": 1.0}, {"k": 1.0}), (0.0, 0.0, 0.0), {"t": n, "k": n}
        )
        choice = evolve(measurements, [0.0, 1.0], [(v, v, v) for v in (0.0, 0.25, 0.5, 0.75, 1.0)])
        assert isinstance(choice.alpha, tuple)
        return choice.alpha, choice.why

    alpha, why = search()
    assert alpha == pytest.approx((0.9, 0.5, 0.3), abs=0.12)
    assert "95 % confidence" in why
    assert sum(shares) < 45  # times all images; the grid of 21 measures them 9,261 times
    assert search() == (alpha, why)
