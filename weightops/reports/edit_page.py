"""The HTML page of an edit: what it did on test data, the search, and the changed pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from weightops.evaluation.units import SCORE, Unit
from weightops.reports.changed_images import ALL_PICTURES, Changes, write_all_pictures
from weightops.reports.edit_tables import model_name, tables_of
from weightops.reports.frontier import LARGEST, drawable
from weightops.reports.page import Curve, Page, Section, Spot, Table, facts, part
from weightops.reports.table import alpha_text, change, models_of
from weightops.search.goal import Goal, Point
from weightops.search.session import EditSession, Measured

_Points = tuple[Sequence[Point], Sequence[Point]]


def write_edit_page(
    folder: Path,
    *,
    summary: Mapping[str, Any],
    names: Sequence[str],
    sweep: Sequence[Measured],
    points: _Points,
    view: Goal,
    session: EditSession,
    test: Mapping[str, Measured],
    word: str,
    title: str,
    forget: Sequence[str] = (),
) -> None:
    """Write ``report.html`` and the page of all changed pictures, ``changed.html``.

    Args:
        folder: the folder to write to.
        summary: the content of ``summary.json``.
        names: the names of the vectors.
        sweep: the edits that were measured on validation data.
        points: the points of those that were measured on all images, and on some of them.
        view: the axes of the curve.
        session: the session, which has the tasks.
        test: model -> scores on test data, ``word`` and what it is compared with among the models.
        word: the word for the edited model.
        title: the title of the page.
        forget: the names of the tasks whose accuracy was to be low.
    """
    tasks = {task.name: task for task in session.tasks}
    other = summary["compared_with"]
    changes = {
        name: Changes(tasks[name], test[other], test[word], forget=name in forget)
        for name in test[word].guesses
    }
    lead = [
        f"alpha {alpha_text(summary['alpha'])}: {summary['why']}.",
        f"Chosen on {summary['chosen_on']}. The test splits were used once, after that choice.",
    ]
    unit = view.unit
    scores = _scores_by_role(summary, changes, word, unit)
    sections = [Section(f"Test {unit.name}", tables=scores)]
    if tables := tables_of(summary):
        sections.append(Section("More results", tables=tables))
    if points[0]:
        curve = _curve(summary, names, sweep, points, view, word)
        sections.append(Section("The search on validation data", curve=curve))
    sections += [_pictures(changes)] if changes else []
    sections.append(facts(_provenance(summary, unit)))
    Page(title, lead, sections).write(folder / "report.html")
    if not changes:
        return
    heading = f"All pictures whose guess has changed: {title}"
    write_all_pictures(folder / ALL_PICTURES, heading, part("page.css"), list(changes.values()))


def _changed(unit: Unit, value: float) -> str:
    return f"{value:+.4g}" if unit is SCORE else change(value)


def _scores_by_role(
    summary: Mapping[str, Any], changes: Mapping[str, Changes], word: str, unit: Unit
) -> list[Table]:
    """Return, for the tasks of each role, a table of scores and one of changes."""
    other = summary["compared_with"]
    by_role: dict[str, list[str]] = {}
    for name, task in summary["tasks"].items():
        by_role.setdefault(task["role"], []).append(name)
    tables = []
    for role, names in by_role.items():
        tables.append(_scores(summary, role, names, word, unit))
        rows = []
        for name in names:
            before, after = (unit.of(summary["tasks"][name][model]) for model in (other, word))
            least, most = unit.change_range
            low, high = (min(max(end, least), most) for end in summary["intervals"][name]["change"])
            interval = f"{_changed(unit, low)} to {_changed(unit, high)}"
            n = summary["tasks"][name][word]["n"]
            counts = [f"{count:,}" for count in changes[name].counts] if changes else []
            gain = _changed(unit, unit.change_from(before, after))
            rows.append([name, gain, interval, f"{n:,}", *counts])
        words = changes[names[0]].words if changes else ()
        header = ["task", "change", "95 % interval", unit.samples, *words]
        of = model_name(other, summary)
        title = f"{role.capitalize()} tasks: change from {of}{unit.told}"
        tables.append(Table(title, header, rows))
    return tables


def _scores(
    summary: Mapping[str, Any], role: str, names: Sequence[str], word: str, unit: Unit
) -> Table:
    """Return the scores of the tasks of a role, the edit's last, and their means."""
    tasks = {name: summary["tasks"][name] for name in names}
    models = [*(model for model in models_of(tasks) if model != word), word]
    rows: list[list[object]] = []
    for name, task in tasks.items():
        scores = [unit.in_cell(task[m]) if m in task else "-" for m in models]
        low, high = summary["intervals"][name][word]
        rows.append([name, *scores, f"{unit.cell(low)} to {unit.cell(high)}"])
    if len(rows) > 1:
        columns = [[unit.of(t[m]) for t in tasks.values() if m in t] for m in models]
        means = [unit.cell(unit.mean(c)) if len(c) == len(rows) else "-" for c in columns]
        rows.append([f"mean of {len(rows)}", *means, ""])
    header = ["task", *(model_name(m, summary) for m in models), f"95 % interval, {word}"]
    title = unit.title.replace(" (%)", ", %")
    return Table(f"{role.capitalize()} tasks: test {title}", header, rows)


def _pictures(changes: Mapping[str, Changes]) -> Section:
    """Return the counts of all tasks, and some of the pictures of each."""
    counts = [f"{name}: {one.text}." for name, one in changes.items()]
    groups = [group for one in changes.values() for group in one.groups()]
    return Section("Test images whose guess has changed", counts, groups=groups)


def _curve(
    summary: Mapping[str, Any],
    names: Sequence[str],
    sweep: Sequence[Measured],
    points: _Points,
    view: Goal,
    word: str,
) -> Curve:
    """Return the measured edits in order of alpha; of several alphas, in order of the score."""
    scores = {measured.coefficients: measured.scores for measured in sweep}
    several = len(points[0][0].coefficients) > 1
    key = (lambda p: (p.score, p.coefficients)) if several else (lambda p: p.coefficients)
    full = sorted(drawable(points[0], view.unit), key=key)
    chosen_alpha = summary["alpha"]
    alpha = tuple(chosen_alpha.values()) if isinstance(chosen_alpha, Mapping) else (chosen_alpha,)
    chosen = next((i for i, p in enumerate(full) if p.coefficients == alpha), 0)
    spots = []
    unit = view.unit
    for i, point in enumerate(full):
        x = (
            unit.reading(point.kept)
            if view.keep
            else float(i + 1)
            if several
            else point.coefficients[0]
        )
        own = {n: min(unit.of(m), LARGEST) for n, m in scores[point.coefficients].items()}
        y = unit.reading(point.score)
        spots.append(Spot(_named(names, point), x, y, own, not point.distance))
    hollow = [
        Spot(_named(names, p), unit.reading(p.kept), unit.reading(p.score))
        for p in (drawable(points[1], unit) if view.keep else ())
    ]
    order = "measured edits, in order of the score"
    return Curve(
        what="alpha",
        hint="The slider stops at measured points; a click in the picture moves it, too. The line "
        f"on each bar marks {next(('the base' for spot in spots if spot.base), spots[0].name)}.",
        x=view.kept if view.keep else order if several else "alpha",
        y=view.what,
        points=spots,
        chosen=chosen,
        percent=bool(view.keep),
        line=not several and len(spots) > 1,
        estimates=hollow,
        labels=_labels(full, chosen, word, unit),
        unit=unit,
        extra=(names, [[f"{a:g}" for a in p.coefficients] for p in full]) if several else ((), ()),
    )


def _named(names: Sequence[str], point: Point) -> str:
    """Return a point's coefficients, each with its vector's name if there are several."""
    if len(point.coefficients) == 1:
        return f"{point.coefficients[0] + 0.0:g}"
    return ", ".join(f"{n} {a + 0.0:g}" for n, a in zip(names, point.coefficients, strict=False))


def _labels(
    points: Sequence[Point], chosen: int, word: str, unit: Unit
) -> list[tuple[int, str, str]]:
    """Return the labels of the chosen point, the base and the full edit, as the picture has."""
    shown = [unit.labelled(float(point.score)) for point in points]
    several = len(points[chosen].coefficients) > 1
    alpha = "" if several else f" (alpha {points[chosen].coefficients[0]:g})"
    labels = [(chosen, f"{word}{alpha} {shown[chosen]}", "chosen")]
    for i, point in enumerate(points):
        if i == chosen:
            continue
        if not point.distance:
            labels.append((i, f"{unit.start}{'' if several else ' (alpha 0)'} {shown[i]}", "base"))
        elif point.coefficients in ((1.0,), (-1.0,)):
            name = "fine-tuned" if point.coefficients == (1.0,) else "all of it"
            labels.append((i, f"{name} (alpha {point.coefficients[0]:g}) {shown[i]}", "full"))
    return labels


def _provenance(summary: Mapping[str, Any], unit: Unit) -> dict[str, Any]:
    """Return where the results come from."""
    tasks_of: dict[str, list[str]] = {}
    for name, task in summary["tasks"].items():
        tasks_of.setdefault(task["source"], []).append(name)
    model, training = summary["model"], summary["training"]
    return {
        "command": summary["command"],
        "model": f"{model['ref']} ({model['fingerprint']})",
        "method": summary["method"],
        "options": summary["options"],
        unit.samples: "; ".join(f"{source} ({', '.join(n)})" for source, n in tasks_of.items()),
        "fine-tuned": training or summary["finetuned"],
        f"{unit.samples} measured": f"{summary[unit.samples]:,}",
        "seconds": summary["seconds"],
        "device": summary["device"],
        "date": summary["date"],
        "versions": summary["versions"],
    }
