"""One HTML page for all of a run: nothing in it comes from elsewhere, and it needs no network."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from weightops.reports.table import cell
from weightops.search.goal import Goal, Point, shown
from weightops.search.session import EditSession, Measured
from weightops.tasks.task import Task

MOST = 12
"""Pictures of each kind."""
SIDE = 96
"""Pixels of a picture's longer side."""


def write_page(
    path: Path,
    summary: Mapping[str, Any],
    sweep: Sequence[Measured],
    points: Sequence[Point],
    view: Goal,
    bench: EditSession,
    test: Mapping[str, Measured],
    word: str,
    title: str,
) -> None:
    """Write the page.

    Args:
        path: the file.
        summary: the content of ``summary.json``.
        sweep: what was measured on validation data.
        points: those of it that were measured in full.
        view: what the curve's axes are.
        bench: has the tasks.
        test: the models on test data, "base" and ``word`` among them.
        word: what the edited model is called.
        title: the page's.
    """
    from jinja2 import Environment

    template = Environment(autoescape=True, trim_blocks=True).from_string(
        Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    )
    curve, chosen = _curve(summary, sweep, points, view)
    alpha = summary["alpha"]
    axes = {
        "score": view.what,
        "kept": view.kept if view.keep else "",
        "alpha": "alpha" if isinstance(alpha, float) else f"alpha of {next(iter(alpha))}",
        "line": len(points) > 1 and not isinstance(points[0].alpha, tuple),
    }
    pictures = _pictures(bench.tasks, test["base"], test[word], set(view.keep))
    models = [which for which in test if which != word]
    data = json.dumps({"points": curve, "chosen": chosen, "axes": axes}).replace("<", "\\u003c")
    sources: dict[str, list[str]] = {}
    for name, task in summary["tasks"].items():
        sources.setdefault(task["source"], []).append(name)
    provenance = [
        ("command", f"weightops {summary['verb']}"),
        ("model", f"{summary['model']['ref']} ({summary['model']['fingerprint']})"),
        ("method", summary["method"]),
        (
            "images",
            "; ".join(f"{source} ({', '.join(names)})" for source, names in sources.items()),
        ),
        (
            "fine-tuned",
            _listed(summary["training"]) if summary["training"] else summary["finetuned"],
        ),
        ("images measured", f"{summary['images']:,}"),
        ("seconds", _listed(summary["seconds"])),
        ("versions", _listed(summary["versions"])),
    ]
    path.write_text(
        template.render(
            title=title,
            summary=summary,
            word=word,
            models=[*models, word],
            points=curve,
            axes=axes,
            data=data,
            cell=cell,
            alpha=shown(alpha)
            if isinstance(alpha, float)
            else ", ".join(f"{a:g} ({name})" for name, a in alpha.items()),
            fixed=[p for p in pictures if p["fixed"]][:MOST],
            broken=[p for p in pictures if not p["fixed"]][:MOST],
            provenance=provenance,
        ),
        encoding="utf-8",
    )


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in values.items())


def _curve(
    summary: Mapping[str, Any], sweep: Sequence[Measured], points: Sequence[Point], view: Goal
) -> tuple[list[dict[str, Any]], int]:
    """The measured points for the page, and the place of the chosen one."""
    by_alpha = {m.coefficients: m for m in sweep}
    rows: list[dict[str, Any]] = []
    for point in points:
        alpha = point.alpha if isinstance(point.alpha, tuple) else (point.alpha,)
        tasks = {name: float(scores["acc1"]) for name, scores in by_alpha[alpha].scores.items()}
        x = point.kept if view.keep else alpha[0]
        rows.append(
            {
                "x": x,
                "y": point.score,
                "label": shown(alpha),
                "alpha": alpha,
                "base": not any(alpha),
                "tasks": tasks,
            }
        )
    rows.sort(key=lambda row: row["alpha"])
    chosen = summary["alpha"]
    wanted = (chosen,) if isinstance(chosen, float) else tuple(chosen.values())
    return rows, next((i for i, row in enumerate(rows) if row["alpha"] == wanted), 0)


def _pictures(
    tasks: Sequence[Task], base: Measured, edited: Measured, kept: set[str]
) -> list[dict[str, Any]]:
    """Test images that the edit has named rightly and the base not, or the reverse; a few of each task, in turn."""
    found: list[tuple[tuple[int, bool], dict[str, Any]]] = []
    for task in tasks:
        images = task.load("test")
        for fixed in (True, False):
            change = edited.hits[task.name].int() - base.hits[task.name].int()
            places = (change == (1 if fixed else -1)).nonzero().flatten().tolist()
            for rank, i in enumerate(places[:: max(1, len(places) // MOST)][:MOST]):
                names = [task.classes[int(which.guesses[task.name][i])] for which in (base, edited)]
                row = {
                    "task": task.name,
                    "truth": task.classes[int(images.labels[i])],
                    "before": names[0],
                    "after": names[1],
                }
                found.append(
                    ((rank, task.name in kept), {**row, "fixed": fixed, "image": (images, i)})
                )
    chosen = [row for _, row in sorted(found, key=lambda pair: pair[0])]
    picked = [
        row for fixed in (True, False) for row in [r for r in chosen if r["fixed"] is fixed][:MOST]
    ]
    return [{**row, "image": _inline(row["image"][0][row["image"][1]])} for row in picked]


def _inline(image: Any) -> str:
    small = image.convert("RGB")
    small.thumbnail((SIDE, SIDE))
    content = io.BytesIO()
    small.save(content, "PNG")
    return "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()
