"""PAINT's experiments: what a patch does beyond the task that it is made for (arXiv 2208.05592)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from weightops.reports.frontier import COLORS, INK
from weightops.reports.outcome import Outcome
from weightops.search.session import Measured
from weightops.tasks.derived import (
    first_half,
    neutral_beside,
    second_half,
    typographic_beside,
    with_classes,
)
from weightops.tasks.striped import STRIPED_COUNTING, STRIPED_LETTERS
from weightops.tasks.table import find_task
from weightops.tasks.task import Task
from weightops.workflows.experiment import ExperimentSettings, accuracy
from weightops.workflows.result import EditResult


def attack(settings: ExperimentSettings) -> Outcome:
    """Typographic attacks: patch on pictures with wrong names beside them (arXiv 2208.05592)."""
    clean = find_task(settings.task or "shapes")
    attacked, harmless = typographic_beside(clean), neutral_beside(clean)
    result, test = settings.patch(attacked, [clean, harmless])
    gains = [
        100 * (accuracy(test["patched"], task) - accuracy(test["base"], task))
        for task in (attacked, harmless)
    ]
    title = (
        f"A patch on attacked {clean.name}: {gains[0]:+.1f} points under attack, "
        f"{gains[1]:+.1f} under neutral words"
    )
    kinds = [(attacked, "wrong class names"), (harmless, "neutral words"), (clean, "no words")]
    supported = [(task, "supported") for task in settings.supported if task.name != clean.name]
    return _before_and_after(title, [*kinds, *supported], result, test)


def broad_transfer(settings: ExperimentSettings) -> Outcome:
    """Broad transfer: patch on half of the classes, test on the others (arXiv 2208.05592)."""
    task = find_task(settings.task) if settings.task else STRIPED_LETTERS
    seen, unseen = first_half(task), second_half(task)
    result, test = settings.patch(seen, [unseen])
    gain = 100 * (accuracy(test["patched"], unseen) - accuracy(test["base"], unseen))
    title = f"A patch on half of the classes of {task.name}: {gain:+.1f} points on the other half"
    return _before_and_after(title, [(seen, "patched on"), (unseen, "never seen")], result, test)


def counting(settings: ExperimentSettings) -> Outcome:
    """Counting: patch on some numbers of things, test on others (arXiv 2208.05592)."""
    task = find_task(settings.task) if settings.task else STRIPED_COUNTING
    seen = with_classes(task, task.classes[::2], f"{task.name}: odd places")
    unseen = with_classes(task, task.classes[1::2], f"{task.name}: even places")
    result, test = settings.patch(seen, [unseen])
    gain = 100 * (accuracy(test["patched"], unseen) - accuracy(test["base"], unseen))
    seen_names, unseen_names = ", ".join(seen.classes), ", ".join(unseen.classes)
    title = f"A patch on {seen_names}: {gain:+.1f} points on {unseen_names}"
    return _before_and_after(title, [(seen, seen_names), (unseen, unseen_names)], result, test)


def _before_and_after(
    title: str, tasks: Sequence[tuple[Task, str]], result: EditResult, test: Mapping[str, Measured]
) -> Outcome:
    """Return the outcome of a patch: tasks with what they are, before and after."""
    rows: list[list[Any]] = []
    for task, kind in tasks:
        before, after = accuracy(test["base"], task), accuracy(test["patched"], task)
        rows.append([task.name, kind, before, after, after - before])
    header = ["task", "what it is", "before", "after", "change"]
    more = {"alpha": result.named_alpha, "why": result.why}
    return Outcome(title, header, rows, lambda axes: _draw_before_and_after(axes, rows), more)


def _draw_before_and_after(axes: Any, rows: Sequence[Sequence[Any]]) -> None:
    for i, (label, column) in enumerate((("before", 2), ("after", 3))):
        bars = axes.bar(
            [j + (i - 0.5) * 0.38 for j in range(len(rows))],
            [100 * row[column] for row in rows],
            width=0.36,
            color=(COLORS[0], COLORS[-1])[i],
            label=label,
        )
        axes.bar_label(bars, fmt="%.0f", fontsize=8, color=INK)
    axes.set_xticks(range(len(rows)), [f"{row[0]}\n{row[1]}" for row in rows], fontsize=8)
    axes.set_ylabel("test accuracy (%)")
    axes.set_ylim(0, 108)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(0, -0.16), ncols=2)
