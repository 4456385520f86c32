"""Pictures of edits: accuracies along alpha, and bars of accuracies by task."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from weightops.errors import missing_extra
from weightops.evaluation.units import ACCURACY, Unit, unit_of
from weightops.reports.table import models_of
from weightops.search.goal import Point, nearest_first

INK, CURVE, CHOSEN, GUIDE = "#22252b", "#2f6db3", "#d1495b", "#9aa1ab"
COLORS = (GUIDE, CURVE, "#c58a1b", "#4b9b6e", "#7a5ba6", CHOSEN)

LARGEST = 1e9
"""The largest score that a picture has room for."""
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
    unit: Unit = ACCURACY,
) -> None:
    """Draw the score to improve against the score to keep, along alpha, as PNG and SVG.

    Args:
        path: the files, without suffix.
        points: one point for each alpha, with alpha 0, on validation data.
        chosen: the point of the chosen alpha.
        estimates: points of alphas that were measured on some of the images only, drawn hollow.
        title: one line above the picture.
        score: the name of the vertical axis.
        kept: the name of the horizontal axis.
        word: the word for the chosen model.
        unit: what the points' values are.

    Raises:
        MissingExtraError: without matplotlib.
    """
    figure, axes = new_figure()
    points, estimates = drawable(points, unit), drawable(estimates, unit)
    points = nearest_first([*points, *estimates])
    full = next((p for p in points if p.alpha in (1, -1)), points[-1])
    _draw_curve(axes, points, full, chosen, unit)
    if estimates:
        xs, ys = _places(estimates, unit)
        mark = {"markersize": 4.5, "markerfacecolor": "white", "color": CURVE, "zorder": 3.5}
        mark["clip_on"] = False
        axes.plot(xs, ys, "o", **mark, label=f"measured on some of the {unit.samples}")
        below = {"loc": "upper left", "bbox_to_anchor": (0, -0.12)}  # no label is there
        axes.legend(frameon=False, fontsize=8.5, **below)
    _draw_labels(axes, points, full, chosen, word, unit)
    axes.set_xlabel(f"{kept}, validation {unit.title}", color=INK)
    axes.set_ylabel(f"{score}, validation {unit.title}", color=INK)
    axes.set_title(title, loc="left", fontsize=11, color=INK, pad=14)
    save_figure(figure, path)


def drawable(points: Sequence[Point], unit: Unit) -> list[Point]:
    """Return the points that a picture has room for."""
    return [p for p in points if max(map(unit.reading, (p.kept, p.score))) < LARGEST]


def _place(point: Point, unit: Unit) -> tuple[float, float]:
    """Return where a point is drawn."""
    return unit.factor * unit.reading(point.kept), unit.factor * unit.reading(point.score)


def _places(points: Sequence[Point], unit: Unit) -> tuple[list[float], list[float]]:
    places = [_place(point, unit) for point in points]
    return [x for x, _ in places], [y for _, y in places]


def _draw_curve(axes: Any, points: Sequence[Point], full: Point, chosen: Point, unit: Unit) -> None:
    """Draw the curve, with marks at the base, the full edit and the chosen point."""
    base = points[0]
    xs, ys = _places(points, unit)
    guide: dict[str, Any] = {"color": GUIDE, "linewidth": 1, "linestyle": (0, (4, 3)), "zorder": 1}
    axes.axvline(_place(base, unit)[0], **guide)
    axes.axhline(_place(full, unit)[1], **guide)
    mark: dict[str, Any] = {"clip_on": False}  # a mark at 100 % stays whole
    axes.plot(xs, ys, color=CURVE, linewidth=2, marker="o", markersize=4.5, zorder=2, **mark)
    axes.plot(*_place(base, unit), marker="s", markersize=9, color=INK, zorder=3, **mark)
    axes.plot(*_place(full, unit), marker="D", markersize=8, color=INK, zorder=3, **mark)
    axes.plot(*_place(chosen, unit), **_STAR, **mark)
    if unit is not ACCURACY:
        _scale(axes, "x", xs)
        _scale(axes, "y", ys)
        axes.margins(0.25)
        return
    x_span, y_span = max(max(xs) - min(xs), 1.0), max(max(ys) - min(ys), 50)
    axes.set_xlim(min(xs) - 0.09 * x_span, min(max(xs) + 0.12 * x_span, 100))
    axes.set_ylim(min(ys) - 0.2 * y_span, min(max(ys) + 9, 100))


def _scale(axes: Any, name: str, values: Sequence[float]) -> None:
    """Give values that differ widely a logarithmic axis, with numbers as they are."""
    if 0 < 8 * min(values) < max(values):
        axes.set(**{f"{name}scale": "log"})
        axis = getattr(axes, f"{name}axis")
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("")


def _draw_labels(
    axes: Any, points: Sequence[Point], full: Point, chosen: Point, word: str, unit: Unit
) -> None:
    """Label the base, the full edit and the chosen point."""
    from matplotlib.patheffects import withStroke

    over_the_curve = {"path_effects": [withStroke(linewidth=3, foreground="white")], "zorder": 5}
    base = points[0]
    place: dict[str, Any] = {"xytext": (-11, 0), "ha": "right", "va": "center"}
    text = f"{unit.start} (alpha 0)\n{unit.labelled(base.score)}"
    labels = [(base, text, _LABEL | place)]
    if chosen.alpha != full.alpha:
        name = "fine-tuned" if full.alpha == 1 else "all of it"
        text = f"{name} (alpha {full.alpha:g})  {unit.labelled(full.score)}"
        at_top = unit is ACCURACY and full.score >= 0.95  # the title is above
        above = -18 if at_top or full.score < base.score else 10
        labels.append((full, text, _LABEL | {"xytext": (0, above), "ha": "left"}))
    text = f"{word} (alpha {chosen.alpha:g})\n{unit.labelled(chosen.score)}"
    labels.append((chosen, text, _CHOSEN_LABEL | _chosen_place(points, full, chosen)))
    for point, text, style in labels:
        axes.annotate(text, _place(point, unit), **style, **over_the_curve)


def _chosen_place(points: Sequence[Point], full: Point, chosen: Point) -> dict[str, Any]:
    """Return where the label of the chosen point has room, also beside that of the full edit."""
    xs = [100 * p.kept for p in points]
    span = max(max(xs) - min(xs), 1.0)
    is_near = full.score >= 0.95 and abs(100 * (chosen.kept - full.kept)) < 0.75 * span
    lower = 20 if is_near and chosen.alpha != full.alpha else 0
    if 100 * chosen.kept < min(xs) + 0.3 * span:
        return {"xytext": (14, -8 - lower), "ha": "left", "va": "top"}
    if chosen.score >= points[0].score:
        return {"xytext": (-14, -6 - lower), "ha": "right", "va": "top"}
    return {"xytext": (-14, 8), "ha": "right", "va": "bottom"}


def draw_bars(path: Path, tasks: Mapping[str, Mapping[str, Any]], *, title: str) -> None:
    """Draw the scores of each task side by side, as PNG and SVG.

    Args:
        path: the files, without suffix.
        tasks: task -> name of a model -> metrics, as in ``summary.json``.
        title: one line above the picture.

    Raises:
        MissingExtraError: without matplotlib.
    """
    figure, axes = new_figure(max(6.4, 1.1 * len(tasks) + 1.5))
    models = models_of(tasks)
    unit = unit_of(next(iter(tasks.values()))[models[0]])
    width = 0.8 / len(models)
    colors = [GUIDE, *COLORS[1 : len(models) - 1], CHOSEN]
    for i, model in enumerate(models):
        shift = (i - (len(models) - 1) / 2) * width
        bars = [
            (j + shift, unit.factor * unit.of(task[model]))
            for j, task in enumerate(tasks.values())
            if model in task
        ]
        axes.bar(*zip(*bars, strict=True), width=0.92 * width, color=colors[i], label=model)
        for x, y in bars:
            label = {"xytext": (0, 2), "ha": "center", "fontsize": 7.5}
            text = f"{y:.0f}" if unit is ACCURACY else unit.cell(y)
            axes.annotate(text, (x, y), **_LABEL | label)
    names = [f"{name}\n{task['role']}" for name, task in tasks.items()]
    axes.set_xticks(range(len(tasks)), names, fontsize=8.5)
    axes.set_ylabel(f"test {unit.title}", color=INK)
    if unit is ACCURACY:
        axes.set_ylim(0, 108)
    else:
        scores = [unit.of(task[m]) for task in tasks.values() for m in models if m in task]
        _scale(axes, "y", scores)
    axes.set_title(title, loc="left", fontsize=10, color=INK)
    axes.legend(
        frameon=False, fontsize=8.5, ncols=len(models), loc="upper left", bbox_to_anchor=(0, -0.12)
    )
    save_figure(figure, path)
