"""The HTML page of a run, in one file that needs no network."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightops.errors import printable
from weightops.evaluation.units import ACCURACY, Unit
from weightops.reports.frontier import LARGEST, drawable
from weightops.reports.table import alpha_text
from weightops.search.goal import Goal, Point, shown
from weightops.search.session import EditSession, Measured
from weightops.tasks.task import Task

if TYPE_CHECKING:
    from jinja2 import Template

MAX_IMAGES = 12
"""The largest number of images of each kind on a page."""

SIDE = 96
"""Pixels of an image's longer side."""


def write_page(
    path: Path,
    *,
    summary: Mapping[str, Any],
    sweep: Sequence[Measured],
    points: Sequence[Point],
    view: Goal,
    session: EditSession,
    test: Mapping[str, Measured],
    word: str,
    title: str,
) -> None:
    """Write the page.

    Args:
        path: the file to write.
        summary: the content of ``summary.json``.
        sweep: the edits that were measured on validation data.
        points: the points of those that were measured on all images.
        view: the axes of the curve.
        session: the session, which has the tasks.
        test: model -> scores on test data, "base" and ``word`` among the models.
        word: the word for the edited model.
        title: the title of the page.
    """
    curve, chosen = _curve(summary, sweep, points, view)
    axes = _axes(summary, points, view)
    data = json.dumps({"points": curve, "chosen": chosen, "axes": axes}).replace("<", "\\u003c")
    fixed, broken = (
        _changed(session.tasks, test["base"], test[word], set(view.keep), fixed=fixed)
        for fixed in (True, False)
    )
    html = _template().render(
        title=title,
        summary=summary,
        word=word,
        models=[*(model for model in test if model != word), word],
        points=curve,
        axes=axes,
        data=data,
        unit=view.unit,
        alpha=alpha_text(summary["alpha"]),
        fixed=fixed,
        broken=broken,
        provenance=_provenance(summary, view.unit),
    )
    path.write_text(html, encoding="utf-8")


def _template() -> Template:
    """Return the template of the page."""
    from jinja2 import Environment

    text = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    return Environment(autoescape=True, trim_blocks=True, finalize=_shown).from_string(text)


def _shown(value: Any) -> Any:
    """Return a value without control characters, line breaks aside."""
    if type(value) is not str:
        return value
    return "\n".join(map(printable, value.split("\n")))


def _axes(summary: Mapping[str, Any], points: Sequence[Point], view: Goal) -> dict[str, Any]:
    """Return the names of the axes, and whether the points are joined by a line."""
    alpha = summary["alpha"]
    return {
        "score": view.what,
        "kept": view.kept if view.keep else "",
        "alpha": "alpha" if isinstance(alpha, float) else f"alpha of {next(iter(alpha))}",
        "factor": view.unit.factor,
        "unit": " (%)" if view.unit is ACCURACY else f", {view.unit.name}",
        "line": len(points) > 1 and not isinstance(points[0].alpha, tuple),
    }


def _provenance(summary: Mapping[str, Any], unit: Unit) -> list[tuple[str, Any]]:
    """Return the rows of the table that says where the results come from."""
    tasks_of: dict[str, list[str]] = {}
    for name, task in summary["tasks"].items():
        tasks_of.setdefault(task["source"], []).append(name)
    model, training = summary["model"], summary["training"]
    return [
        ("command", f"weightops {summary['verb']}"),
        ("model", f"{model['ref']} ({model['fingerprint']})"),
        ("method", summary["method"]),
        ("options", _listed(summary["options"])),
        ("data", "; ".join(f"{source} ({', '.join(n)})" for source, n in tasks_of.items())),
        ("fine-tuned", _listed(training) if training else summary["finetuned"]),
        (f"{unit.samples} measured", f"{summary[unit.samples]:,}"),
        ("seconds", _listed(summary["seconds"])),
        ("versions", _listed(summary["versions"])),
    ]


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in values.items())


def _curve(
    summary: Mapping[str, Any], sweep: Sequence[Measured], points: Sequence[Point], view: Goal
) -> tuple[list[dict[str, Any]], int]:
    """Return the points in order of alpha, for the page's script, and the index of the chosen."""
    by_alpha = {measured.coefficients: measured for measured in sweep}
    rows: list[dict[str, Any]] = []
    for point in drawable(points, view.unit):
        alpha = point.alpha if isinstance(point.alpha, tuple) else (point.alpha,)
        scores = by_alpha[alpha].scores
        rows.append(
            {
                "x": view.unit.reading(point.kept) if view.keep else alpha[0],
                "y": view.unit.reading(point.score),
                "label": shown(alpha),
                "alpha": alpha,
                "base": not any(alpha),
                "tasks": {n: min(view.unit.of(m), LARGEST) for n, m in scores.items()},
            }
        )
    rows.sort(key=lambda row: row["alpha"])
    chosen = summary["alpha"]
    chosen_alpha = (chosen,) if isinstance(chosen, float) else tuple(chosen.values())
    return rows, next((i for i, row in enumerate(rows) if row["alpha"] == chosen_alpha), 0)


def _changed(
    tasks: Sequence[Task], base: Measured, edited: Measured, kept: set[str], *, fixed: bool
) -> list[dict[str, Any]]:
    """Return test images that the edit fixed or broke, the tasks taking turns.

    Args:
        tasks: the tasks.
        base: the scores of the base.
        edited: the scores of the edited model.
        kept: the names of the tasks that must not get worse, which come last in each turn.
        fixed: whether the edit fixed the images, or broke them.
    """
    ranked: list[tuple[tuple[int, bool], Task, int]] = []
    for task in tasks:
        if task.name not in base.guesses:
            continue
        change = edited.hits[task.name].int() - base.hits[task.name].int()
        indices = (change == (1 if fixed else -1)).nonzero().flatten().tolist()
        spread = indices[:: max(1, len(indices) // MAX_IMAGES)][:MAX_IMAGES]
        ranked += [((rank, task.name in kept), task, i) for rank, i in enumerate(spread)]
    ranked.sort(key=lambda entry: entry[0])
    examples = []
    for _, task, i in ranked[:MAX_IMAGES]:
        images = task.load("test")
        before, after = (task.classes[int(m.guesses[task.name][i])] for m in (base, edited))
        examples.append(
            {
                "task": task.name,
                "truth": task.classes[int(images.labels[i])],
                "before": before,
                "after": after,
                "fixed": fixed,
                "image": _data_url(images[i]),
            }
        )
    return examples


def _data_url(image: Any) -> str:
    """Return a small copy of an image that a page can contain."""
    small = image.convert("RGB")
    small.thumbnail((SIDE, SIDE))
    content = io.BytesIO()
    small.save(content, "PNG")
    return "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()
