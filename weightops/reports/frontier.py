"""Pictures: the papers' scatter of what is improved against what must not get worse, along alpha; and bars of accuracies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from weightops.errors import missing_extra
from weightops.search.goal import Point, nearest_first

INK, CURVE, CHOSEN, GUIDE = "#22252b", "#2f6db3", "#d1495b", "#9aa1ab"
COLORS = (GUIDE, CURVE, "#c58a1b", "#4b9b6e", "#7a5ba6", CHOSEN)


def new_figure(width: float = 6.4, height: float = 4.4) -> tuple[Any, Any]:
    """A figure and its axes.

    Raises:
        MissingExtraError: without matplotlib.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise missing_extra("matplotlib", "plot", "to draw pictures") from None
    figure = Figure(figsize=(width, height), dpi=200, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK)
    return figure, axes


def save_figure(figure: Any, path: Path) -> None:
    """Write ``path.png`` and ``path.svg``."""
    figure.savefig(path.with_suffix(".png"), format="png", metadata={"Software": None})
    figure.savefig(path.with_suffix(".svg"), format="svg", metadata={"Date": None, "Creator": None})


def draw_frontier(
    path: Path,
    points: Sequence[Point],
    chosen: Point,
    *,
    title: str,
    score: str,
    kept: str,
    word: str = "patched",
) -> None:
    """Draw the frontier, as PNG and SVG.

    Args:
        path: the files, without suffix.
        points: one for each alpha, 0 among them, on validation data.
        chosen: the point of the alpha that was chosen.
        title: one line above the picture.
        score: what the vertical axis measures.
        kept: what the horizontal axis measures.
        word: what the chosen model is called.

    Raises:
        MissingExtraError: without matplotlib.
    """
    figure, axes = new_figure()
    points = nearest_first(points)
    base = points[0]
    full = next((p for p in points if p.alpha in (1, -1)), points[-1])
    xs, ys = [100 * p.kept for p in points], [100 * p.score for p in points]
    guide: dict[str, Any] = {"color": GUIDE, "linewidth": 1, "linestyle": (0, (4, 3)), "zorder": 1}
    axes.axvline(100 * base.kept, **guide)
    axes.axhline(100 * full.score, **guide)
    axes.plot(xs, ys, color=CURVE, linewidth=2, marker="o", markersize=4.5, zorder=2)
    axes.plot(100 * base.kept, 100 * base.score, marker="s", markersize=9, color=INK, zorder=3)
    axes.plot(100 * full.kept, 100 * full.score, marker="D", markersize=8, color=INK, zorder=3)
    star: dict[str, Any] = {
        "marker": "*",
        "markersize": 19,
        "color": CHOSEN,
        "markeredgecolor": "white",
        "zorder": 4,
    }
    axes.plot(100 * chosen.kept, 100 * chosen.score, **star)
    span = max(max(xs) - min(xs), 1.0)
    axes.set_xlim(min(xs) - 0.09 * span, max(xs) + 0.12 * span)
    axes.set_ylim(min(ys) - 0.2 * max(max(ys) - min(ys), 50), min(max(ys) + 9, 101.5))
    label: dict[str, Any] = {"fontsize": 9.5, "color": INK, "textcoords": "offset points"}
    red = label | {"color": CHOSEN, "fontweight": "bold"}
    rises = chosen.score >= base.score
    end = "fine-tuned" if full.alpha == 1 else "all of it"
    left = label | {"xytext": (-11, 0), "ha": "right", "va": "center"}
    beside = red | {
        "xytext": (-14, -6 if rises else 8),
        "ha": "right",
        "va": "top" if rises else "bottom",
    }
    if 100 * chosen.kept < min(xs) + 0.3 * span:  # there is no room on the left
        beside = red | {"xytext": (14, -8), "ha": "left", "va": "top"}
    labels = [
        (base, f"zero-shot (alpha 0)\n{100 * base.score:.1f} %", left),
        (
            full,
            f"{end} (alpha {full.alpha:g})  {100 * full.score:.1f} %",
            label | {"xytext": (0, 10), "ha": "left"},
        ),
        (chosen, f"{word} (alpha {chosen.alpha:g})\n{100 * chosen.score:.1f} %", beside),
    ]
    for point, text, place in labels if chosen.alpha != full.alpha else [labels[0], labels[2]]:
        axes.annotate(text, (100 * point.kept, 100 * point.score), **place)
    axes.set_xlabel(f"{kept}, validation accuracy (%)", color=INK)
    axes.set_ylabel(f"{score}, validation accuracy (%)", color=INK)
    axes.set_title(title, loc="left", fontsize=11, color=INK)
    save_figure(figure, path)


def draw_bars(path: Path, tasks: Mapping[str, Mapping[str, Any]], *, title: str) -> None:
    """Draw each task's accuracies side by side, as PNG and SVG.

    Args:
        path: the files, without suffix.
        tasks: task -> name of a model -> metrics, as in a summary.
        title: one line above the picture.

    Raises:
        MissingExtraError: without matplotlib.
    """
    figure, axes = new_figure(max(6.4, 1.1 * len(tasks) + 1.5))
    models = list(
        dict.fromkeys(
            which for task in tasks.values() for which, m in task.items() if isinstance(m, Mapping)
        )
    )
    width = 0.8 / len(models)
    colors = [GUIDE, *COLORS[1 : len(models) - 1], CHOSEN]
    for i, which in enumerate(models):
        bars = [
            (j + (i - (len(models) - 1) / 2) * width, 100 * t[which]["acc1"])
            for j, t in enumerate(tasks.values())
            if which in t
        ]
        axes.bar(*zip(*bars, strict=True), width=0.92 * width, color=colors[i], label=which)
        for x, y in bars:
            axes.annotate(
                f"{y:.0f}",
                (x, y),
                xytext=(0, 2),
                textcoords="offset points",
                ha="center",
                fontsize=7.5,
                color=INK,
            )
    axes.set_xticks(
        range(len(tasks)), [f"{name}\n{task['role']}" for name, task in tasks.items()], fontsize=8.5
    )
    axes.set_ylabel("test accuracy (%)", color=INK)
    axes.set_ylim(0, 108)
    axes.set_title(title, loc="left", fontsize=10, color=INK)
    axes.legend(
        frameon=False, fontsize=8.5, ncols=len(models), loc="upper left", bbox_to_anchor=(0, -0.12)
    )
    save_figure(figure, path)
