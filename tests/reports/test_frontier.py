"""The picture of an edit along alpha: its axes end at 100 %, and no text lies over another."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")

from weightops.reports import frontier
from weightops.search.goal import Point

PATCHED = [(0, 0.10, 0.999), (0.3, 0.85, 0.998), (0.6, 0.97, 0.995), (1, 1.0, 0.99)]
NEGATED = [(0, 0.93, 0.97), (-0.3, 0.8, 0.965), (-0.6, 0.5, 0.955), (-1, 0.02, 0.90)]
LEFT = [(0, 0.10, 0.9), (0.3, 0.95, 0.62), (0.6, 0.97, 0.61), (1, 1.0, 0.6)]


@pytest.mark.parametrize("values", [PATCHED, NEGATED, LEFT], ids=["patch", "negate", "left"])
def test_texts_lie_apart_and_axes_end(
    values: list[tuple[float, float, float]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Any] = []
    monkeypatch.setattr(frontier, "save_figure", lambda figure, path: figures.append(figure))
    points = [Point(*value) for value in values]
    some = [Point(points[1].alpha / 2, 0.3, 1.0)]
    names = {"title": "patch of mnist", "score": "mnist", "kept": "the others"}
    frontier.draw_frontier(tmp_path / "f", points, points[2], estimates=some, **names)
    figure = figures[0]
    (axes,) = figure.axes
    assert axes.get_xlim()[1] <= 100
    assert axes.get_ylim()[1] <= 100
    figure.canvas.draw()
    texts = [*axes.texts, axes._left_title, axes.xaxis.label, axes.get_legend()]
    boxes = [text.get_window_extent() for text in texts]
    for (one, a), (other, b) in combinations(zip(texts, boxes, strict=True), 2):
        assert not a.overlaps(b), (one, other)
