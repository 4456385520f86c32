"""Pictures of edits: accuracies along alpha, and bars of accuracies by task."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from weightops.errors import missing_extra
from weightops.reports.table import models_of
from weightops.search.goal import Point, nearest_first

INK, CURVE, CHOSEN, GUIDE = "#22252b", "#2f6db3", "#d1495b", "#9aa1ab"
COLORS = (GUIDE, CURVE, "#c58a1b", "#4b9b6e", "#7a5ba6", CHOSEN)

_LABEL = {"fontsize": 9.5, "color": INK, "textcoords": "offset points"}
_CHOSEN_LABEL = _LABEL | {"color": CHOSEN, "fontweight": "bold"}
_STAR = {"marker": "*", "markersize": 19, "color": CHOSEN, "markeredgecolor": "white", "zorder": 4}


def blank_figure(width: float, height: float) -> Any:
    """Return a figure of matplotlib without axes; sizes are in inches.

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
    return figure


def new_figure(width: float = 6.4, height: float = 4.4) -> tuple[Any, Any]:
    """Return a figure of matplotlib and its axes; sizes are in inches.

    Raises:
        MissingExtraError: without matplotlib.
    """
    figure = blank_figure(width, height)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK)
    return figure, axes


_WITHOUT_DATE: dict[str, dict[str, Any]] = {
    "png": {"Software": None},
    "svg": {"Date": None, "Creator": None},
    "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
}
"""Format -> the metadata that keep a picture the same from run to run."""


def write_figure(figure: Any, target: Path | IO[bytes], kind: str) -> None:
    """Write a figure as "png", "svg" or "pdf", with the same bytes each time."""
    from matplotlib import rc_context

    # The letters of a PDF stay text that can be edited; the salt keeps SVG's names the same.
    with rc_context({"pdf.fonttype": 42, "svg.hashsalt": "weightops"}):
        figure.savefig(target, format=kind, metadata=_WITHOUT_DATE[kind])


def save_figure(figure: Any, path: Path) -> None:
    """Write ``path.png`` and ``path.svg``."""
    for kind in ("png", "svg"):
        write_figure(figure, path.with_suffix(f".{kind}"), kind)


def svg_of(figure: Any) -> str:
    """Return a figure as an SVG element that a page can contain."""
    content = io.BytesIO()
    write_figure(figure, content, "svg")
    text = content.getvalue().decode()
    return text[text.index("<svg") :]


def draw_frontier(
    path: Path,
    points: Sequence[Point],
    chosen: Point,
    *,
    estimates: Sequence[Point] = (),
    title: str,
    score: str,
    kept: str,
    word: str = "patched",
) -> None:
    """Draw accuracy to improve against accuracy to keep, along alpha, as PNG and SVG.

    Args:
        path: the files, without suffix.
        points: one point for each alpha, with alpha 0, on validation data.
        chosen: the point of the chosen alpha.
        estimates: points of alphas that were measured on some of the images only, drawn hollow.
        title: one line above the picture.
        score: the name of the vertical axis.
        kept: the name of the horizontal axis.
        word: the word for the chosen model.

    Raises:
        MissingExtraError: without matplotlib.
    """
    figure, axes = new_figure()
    points = nearest_first([*points, *estimates])
    full = next((p for p in points if p.alpha in (1, -1)), points[-1])
    _draw_curve(axes, points, full, chosen)
    if estimates:
        xs, ys = [100 * p.kept for p in estimates], [100 * p.score for p in estimates]
        mark = {"markersize": 4.5, "markerfacecolor": "white", "color": CURVE, "zorder": 3.5}
        axes.plot(xs, ys, "o", **mark, label="measured on some of the images")
        axes.legend(frameon=False, fontsize=8.5, loc="lower left")
    _draw_labels(axes, points, full, chosen, word)
    axes.set_xlabel(f"{kept}, validation accuracy (%)", color=INK)
    axes.set_ylabel(f"{score}, validation accuracy (%)", color=INK)
    axes.set_title(title, loc="left", fontsize=11, color=INK)
    save_figure(figure, path)


def _draw_curve(axes: Any, points: Sequence[Point], full: Point, chosen: Point) -> None:
    """Draw the curve, with marks at the base, the full edit and the chosen point."""
    base = points[0]
    xs, ys = [100 * p.kept for p in points], [100 * p.score for p in points]
    guide: dict[str, Any] = {"color": GUIDE, "linewidth": 1, "linestyle": (0, (4, 3)), "zorder": 1}
    axes.axvline(100 * base.kept, **guide)
    axes.axhline(100 * full.score, **guide)
    axes.plot(xs, ys, color=CURVE, linewidth=2, marker="o", markersize=4.5, zorder=2)
    axes.plot(100 * base.kept, 100 * base.score, marker="s", markersize=9, color=INK, zorder=3)
    axes.plot(100 * full.kept, 100 * full.score, marker="D", markersize=8, color=INK, zorder=3)
    axes.plot(100 * chosen.kept, 100 * chosen.score, **_STAR)
    x_span, y_span = max(max(xs) - min(xs), 1.0), max(max(ys) - min(ys), 50)
    axes.set_xlim(min(xs) - 0.09 * x_span, max(xs) + 0.12 * x_span)
    axes.set_ylim(min(ys) - 0.2 * y_span, min(max(ys) + 9, 101.5))


def _draw_labels(axes: Any, points: Sequence[Point], full: Point, chosen: Point, word: str) -> None:
    """Label the base, the full edit and the chosen point."""
    base = points[0]
    place: dict[str, Any] = {"xytext": (-11, 0), "ha": "right", "va": "center"}
    labels = [(base, f"zero-shot (alpha 0)\n{100 * base.score:.1f} %", _LABEL | place)]
    if chosen.alpha != full.alpha:
        name = "fine-tuned" if full.alpha == 1 else "all of it"
        text = f"{name} (alpha {full.alpha:g})  {100 * full.score:.1f} %"
        above = 10 if full.score < 0.95 else -18  # the title is above
        labels.append((full, text, _LABEL | {"xytext": (0, above), "ha": "left"}))
    text = f"{word} (alpha {chosen.alpha:g})\n{100 * chosen.score:.1f} %"
    labels.append((chosen, text, _CHOSEN_LABEL | _chosen_place(points, chosen)))
    for point, text, style in labels:
        axes.annotate(text, (100 * point.kept, 100 * point.score), **style)


def _chosen_place(points: Sequence[Point], chosen: Point) -> dict[str, Any]:
    """Return where the label of the chosen point has room."""
    xs = [100 * p.kept for p in points]
    if 100 * chosen.kept < min(xs) + 0.3 * max(max(xs) - min(xs), 1.0):
        return {"xytext": (14, -8), "ha": "left", "va": "top"}
    if chosen.score >= points[0].score:
        return {"xytext": (-14, -6), "ha": "right", "va": "top"}
    return {"xytext": (-14, 8), "ha": "right", "va": "bottom"}


def draw_bars(path: Path, tasks: Mapping[str, Mapping[str, Any]], *, title: str) -> None:
    """Draw the accuracies of each task side by side, as PNG and SVG.

    Args:
        path: the files, without suffix.
        tasks: task -> name of a model -> metrics, as in ``summary.json``.
        title: one line above the picture.

    Raises:
        MissingExtraError: without matplotlib.
    """
    figure, axes = new_figure(max(6.4, 1.1 * len(tasks) + 1.5))
    models = models_of(tasks)
    width = 0.8 / len(models)
    colors = [GUIDE, *COLORS[1 : len(models) - 1], CHOSEN]
    for i, model in enumerate(models):
        shift = (i - (len(models) - 1) / 2) * width
        bars = [
            (j + shift, 100 * task[model]["acc1"])
            for j, task in enumerate(tasks.values())
            if model in task
        ]
        axes.bar(*zip(*bars, strict=True), width=0.92 * width, color=colors[i], label=model)
        for x, y in bars:
            label = {"xytext": (0, 2), "ha": "center", "fontsize": 7.5}
            axes.annotate(f"{y:.0f}", (x, y), **_LABEL | label)
    names = [f"{name}\n{task['role']}" for name, task in tasks.items()]
    axes.set_xticks(range(len(tasks)), names, fontsize=8.5)
    axes.set_ylabel("test accuracy (%)", color=INK)
    axes.set_ylim(0, 108)
    axes.set_title(title, loc="left", fontsize=10, color=INK)
    axes.legend(
        frameon=False, fontsize=8.5, ncols=len(models), loc="upper left", bbox_to_anchor=(0, -0.12)
    )
    save_figure(figure, path)
