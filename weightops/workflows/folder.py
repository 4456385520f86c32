"""Write the folder of a run: the edited model, its results, pictures, page and card."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from weightops.checkpoints.opening import open_checkpoint
from weightops.checkpoints.output_layout import folders_of
from weightops.errors import MissingExtraError
from weightops.merging.recipe import Recipe
from weightops.reports.card import card
from weightops.reports.edit_page import write_edit_page
from weightops.reports.eval_results import write_eval_results
from weightops.reports.frontier import draw_bars, draw_frontier
from weightops.search.goal import Point
from weightops.search.session import EditSession, Measured
from weightops.support.json_files import jsonable, write_json
from weightops.support.result_files import CARD, RECIPE
from weightops.support.text import file_name, portable
from weightops.support.yaml_files import yaml_text
from weightops.workflows.base import Workflow
from weightops.workflows.result import EditResult
from weightops.workflows.run_file import run_file
from weightops.workflows.summary import title

log = logging.getLogger("weightops")


def write_folder(
    folder: Path,
    workflow: Workflow,
    session: EditSession,
    result: EditResult,
    test: Mapping[str, Measured],
    summary: Mapping[str, Any],
) -> None:
    """Write all results of a run into its folder.

    Args:
        folder: the folder, which exists and is empty.
        workflow: the workflow.
        session: the session that it ran in.
        result: its vectors and coefficients.
        test: model -> scores on the test splits.
        summary: the content of ``summary.json``.
    """
    summary = {**portable(summary), "output": Path(summary["output"]).name}
    edited = session.edited(result.edit)
    edited.recipe = {"verb": workflow.verb, "alpha": result.named_alpha, **workflow.options}
    edited.save_into(folder)
    text = card(summary, workflow.word, edited.architecture, folders_of(edited.form))
    (folder / CARD).write_text(text, encoding="utf-8")
    write_eval_results(folder, summary, workflow.word)
    lines = [
        json.dumps(jsonable(portable(row))) + "\n" for row in _rows(workflow, session, result, test)
    ]
    (folder / "results.jsonl").write_text("".join(lines), encoding="utf-8")
    (folder / "run.yaml").write_text(run_file(workflow), encoding="utf-8")
    if workflow.keeps_vectors:
        _write_vectors(folder, result)
    stated = summary.get("recipe")
    recipe = Recipe.of(stated) if isinstance(stated, Mapping) else _recipe(workflow, result)
    (folder / RECIPE).write_text(yaml_text(portable(recipe.to_dict())), encoding="utf-8")
    _copy_logs(folder, session)
    heading = title(workflow, summary)
    points = workflow.points(result.sweep), workflow.estimates(result.sweep)
    _draw(folder, workflow, result, summary, points, heading)
    write_edit_page(
        folder,
        summary=summary,
        names=list(result.vectors),
        sweep=result.sweep,
        points=points,
        view=workflow.view,
        session=session,
        test=test,
        word=workflow.word,
        title=heading,
        forget=[task.name for task in workflow.learned] if workflow.sign < 0 else [],
    )
    write_json(folder / "summary.json", summary)


def _rows(
    workflow: Workflow, session: EditSession, result: EditResult, test: Mapping[str, Measured]
) -> Iterator[dict[str, Any]]:
    """Yield a row for each edit and task: the sweep on validation data, then the test scores."""
    splits = {
        "validation": [("sweep", measured) for measured in result.sweep],
        "test": list(test.items()),
    }
    for split, edits in splits.items():
        model = session.model_for(split)
        for weights, measured in edits:
            alpha = measured.coefficients
            named = dict(zip(result.vectors, alpha, strict=False)) or None
            for task in workflow.tasks:
                if task.name in measured.scores:
                    scores = measured.scores[task.name]
                    yield {
                        **session.scoring.record(model, task, split, scores, measured.fingerprint),
                        "alpha": alpha[0] if len(alpha) == 1 else named,
                        "weights": weights,
                    }


def _write_vectors(folder: Path, result: EditResult) -> None:
    for file, vector in zip(_vector_files(result), result.vectors.values(), strict=True):
        vector.save(folder / file)


def _vector_files(result: EditResult) -> list[str]:
    """Return the name of each vector's file."""
    if len(result.vectors) == 1:
        return ["task_vector.safetensors"]
    return [f"task_vector.{file_name(name)}.safetensors" for name in result.vectors]


def _recipe(workflow: Workflow, result: EditResult) -> Recipe:
    """Return the recipe of the chosen edit: of the folder's own vectors, or the given models."""
    base = workflow.checkpoint.ref
    refs = [f"./{file}" for file in _vector_files(result)]
    if not workflow.keeps_vectors:
        refs = [open_checkpoint(model).ref for model in workflow.finetuned]
    used = {ref: alpha for ref, alpha in zip(refs, result.alpha, strict=True) if alpha} or {base: 1}
    return Recipe(
        tuple(used),
        "task_arithmetic",
        base=base,
        weights=tuple(used.values()),
        batchnorm=workflow.options.get("batchnorm"),
    )


def _copy_logs(folder: Path, session: EditSession) -> None:
    logs = sorted(session.work_folder.glob("*/log.jsonl")) if session.work_folder else []
    for path in logs:
        middle = "" if len(logs) == 1 else f".{path.parent.name}"
        shutil.copyfile(path, folder / f"finetuning{middle}.jsonl")


def _draw(
    folder: Path,
    workflow: Workflow,
    result: EditResult,
    summary: Mapping[str, Any],
    points: tuple[Sequence[Point], Sequence[Point]],
    heading: str,
) -> None:
    """Draw the frontier of one coefficient under a constraint, else bars by task."""
    view, (measured, estimates) = workflow.view, points
    try:
        if view.keep and len(result.alpha) == 1:
            chosen = next(point for point in measured if point.alpha == result.alpha[0])
            draw_frontier(
                folder / "frontier",
                measured,
                chosen,
                estimates=estimates,
                title=heading,
                score=view.what,
                kept=view.kept,
                word=workflow.word,
                unit=workflow.unit,
            )
        else:
            draw_bars(folder / workflow.unit.name, summary["tasks"], title=heading)
    except MissingExtraError as error:
        log.warning("the picture is left out: %s", error)
