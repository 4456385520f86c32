"""Summarize a run of a workflow: scores, intervals, and where all of it came from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from weightops.checkpoints.opening import open_checkpoint
from weightops.evaluation.units import ACCURACY, Z_95
from weightops.search.goal import difference
from weightops.search.session import EditSession, Measured
from weightops.support.invocation import invocation, today, versions
from weightops.task_vector import TaskVector
from weightops.tasks.derived import parts_of
from weightops.tasks.task import SPLITS, Task
from weightops.workflows.base import Workflow
from weightops.workflows.result import EditResult


def summarize(
    workflow: Workflow,
    session: EditSession,
    result: EditResult,
    test: Mapping[str, Measured],
    seconds: Mapping[str, float],
    out: Path,
) -> dict[str, Any]:
    """Return the content of ``summary.json``.

    Args:
        workflow: the workflow.
        session: the session that it ran in.
        result: its vectors and coefficients.
        test: model -> scores on the test splits.
        seconds: part of the run -> how long it took.
        out: the run's folder.
    """
    tasks = {
        task.name: {
            "role": role,
            **task.reading(*_splits(workflow, task)),
            **{
                model: dict(measured.scores[task.name])
                for model, measured in test.items()
                if task.name in measured.scores
            },
        }
        for task, role in workflow.roles.items()
    }
    intervals = {name: _intervals(name, test, workflow) for name in tasks}
    chosen_on = [name for name in tasks if any(name in m.hits for m in result.sweep)]
    summary = {
        "alpha": result.named_alpha,
        "compared_with": workflow.compared_with,
        "chosen_on": "the validation splits of " + ", ".join(chosen_on),
        "why": result.why,
        "tasks": tasks,
        "intervals": intervals,
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        workflow.unit.samples: session.samples_measured,
        **settings(workflow),
        "device": str(session.model.device),
        "output": str(out.absolute()),
        "versions": versions(),
        "date": today(),
        "command": invocation(),
        **result.more,
    }
    return {**summary, **workflow.conclude(tasks)}


def _splits(workflow: Workflow, task: Task) -> list[str]:
    """Return the splits of a task that a workflow uses."""
    learned = [part for one in workflow.learned for part in (one, *parts_of(one))]
    trains = task in learned and not workflow.finetuned
    return [split for split in SPLITS if split != "train" or trains]


def settings(workflow: Workflow) -> dict[str, Any]:
    """Return what a run was asked to do: two runs with equal settings give the same results."""
    return {
        "verb": workflow.verb,
        "method": workflow.method,
        "options": dict(workflow.options),
        "search": asdict(workflow.search),
        "model": {"ref": workflow.checkpoint.ref, "fingerprint": workflow.checkpoint.fingerprint},
        "finetuned": _refs(workflow.finetuned),
        "training": None if workflow.finetuned else asdict(workflow.config),
        "seed": workflow.config.seed,
        "precision": workflow.precision,
    }


def _intervals(
    task: str, test: Mapping[str, Measured], workflow: Workflow
) -> dict[str, tuple[float, float]]:
    """Return 95 % intervals of each model's score on a task, and of the edit's change.

    An edit that is compared with another model than the base has its change from the base, too.
    """
    hits, unit = {model: m.hits[task] for model, m in test.items() if task in m.hits}, workflow.unit
    changes = {"change": workflow.compared_with}
    if workflow.compared_with != "base" and "base" in hits:
        changes["change_from_base"] = "base"
    intervals = {model: unit.interval(own) for model, own in hits.items()}
    for name, other in changes.items():
        change, error = difference({task: hits[workflow.word]}, {task: hits[other]}, {task: 1.0})
        half_width = Z_95 * error
        low, high = sorted(unit.change(change + side) for side in (-half_width, half_width))
        intervals[name] = (low, high)
    return intervals


def title(workflow: Workflow, summary: Mapping[str, Any]) -> str:
    """Return the line above the picture: what the edit did on test data."""
    view, unit = workflow.view, workflow.unit
    texts = []
    for label, weights in ((", ".join(view.score), view.score), (view.kept, view.keep)):
        if weights:
            rows = [summary["tasks"][name] for name in weights]
            before, after = (
                unit.cell(unit.mean([unit.of(row[model]) for row in rows]))
                for model in (workflow.compared_with, workflow.word)
            )
            texts.append(f"{label} {before} → {after}{unit.mark}")
    alphas = summary["alpha"] if isinstance(summary["alpha"], Mapping) else {}
    unused = [name for name, alpha in alphas.items() if alpha == 0]
    without = f", without {', '.join(unused)} (alpha 0)" if unused else ""
    other = f", {workflow.compared_with} → {workflow.word}"
    compared = other if workflow.compared_with != "base" else ""
    what = "test" if unit is ACCURACY else f"test {unit.name}"
    return f"{', '.join(texts)}{compared} ({what}){without}"


def _refs(finetuned: Sequence[Any]) -> Any:
    """Return the ref of the weights that were given, a list of several, or None."""
    refs = [_ref(given) for given in finetuned]
    return refs[0] if len(refs) == 1 else refs or None


def _ref(given: Any) -> str:
    if isinstance(given, TaskVector):
        return repr(given)
    return str(given) if isinstance(given, (str, Path)) else open_checkpoint(given).ref
