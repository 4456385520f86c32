"""The papers' scatter: accuracy on the patching task against accuracy on supported tasks, along alpha."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from weightops.errors import missing_extra
from weightops.search import Point

INK, CURVE, CHOSEN, GUIDE = "#22252b", "#2f6db3", "#d1495b", "#9aa1ab"


def draw_frontier(
    path: Path, points: Sequence[Point], chosen: Point, *, title: str, patching: str, supported: str
) -> None:
    """Draw the frontier to a PNG file.

    Args:
        path: the file.
        points: one for each alpha, 0 and 1 among them, on validation data.
        chosen: the point of the alpha that was chosen.
        title: one line above the picture.
        patching: what the vertical axis measures.
        supported: what the horizontal axis measures.

    Raises:
        MissingExtraError: without matplotlib.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise missing_extra("matplotlib", "plot", "to draw the frontier") from None
    points = sorted(points, key=lambda point: point.alpha)
    base, full = (next(p for p in points if p.alpha == alpha) for alpha in (0, 1))
    xs, ys = [100 * p.supported for p in points], [100 * p.patching for p in points]
    figure = Figure(figsize=(6.4, 4.4), dpi=200, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.axvline(100 * base.supported, color=GUIDE, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    axes.axhline(100 * full.patching, color=GUIDE, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    axes.plot(xs, ys, color=CURVE, linewidth=2, marker="o", markersize=4.5, zorder=2)
    axes.plot(100 * base.supported, 100 * base.patching, marker="s", markersize=9, color=INK, zorder=3)
    axes.plot(100 * full.supported, 100 * full.patching, marker="D", markersize=8, color=INK, zorder=3)
    axes.plot(
        100 * chosen.supported,
        100 * chosen.patching,
        marker="*",
        markersize=19,
        color=CHOSEN,
        markeredgecolor="white",
        zorder=4,
    )
    span = max(max(xs) - min(xs), 1.0)
    axes.set_xlim(min(xs) - 0.09 * span, max(xs) + 0.12 * span)
    axes.set_ylim(min(ys) - 7, min(max(ys) + 9, 101.5))
    label: dict[str, Any] = {"fontsize": 9.5, "color": INK, "textcoords": "offset points"}
    axes.annotate(
        f"zero-shot (alpha 0)\n{100 * base.patching:.1f} %",
        (100 * base.supported, 100 * base.patching),
        xytext=(-11, 0),
        ha="right",
        va="center",
        **label,
    )
    axes.annotate(
        f"fine-tuned (alpha 1)  {100 * full.patching:.1f} %",
        (100 * full.supported, 100 * full.patching),
        xytext=(0, 10),
        ha="left",
        **label,
    )
    axes.annotate(
        f"patched (alpha {chosen.alpha:g})\n{100 * chosen.patching:.1f} %", (100 * chosen.supported, 100 * chosen.patching),
        xytext=(-14, -6), ha="right", va="top", **(label | {"color": CHOSEN, "fontweight": "bold"}),
    )  # fmt: skip
    axes.set_xlabel(f"{supported}, validation accuracy (%)", color=INK)
    axes.set_ylabel(f"{patching}, validation accuracy (%)", color=INK)
    axes.set_title(title, loc="left", fontsize=11, color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK)
    figure.savefig(path, format="png", metadata={"Software": None})
