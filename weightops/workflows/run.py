"""Run a workflow: learn, choose, confirm once on test data, and write all of it at once."""

from __future__ import annotations

import logging
import shutil
import time
from pathlib import Path
from typing import Any

from weightops.errors import NothingSatisfiesError, OptionError, OutputError
from weightops.search.session import EditSession
from weightops.support.atomic import atomic_output, check_free, reserved
from weightops.support.json_files import jsonable, read_json
from weightops.support.progress import Job, job
from weightops.support.text import portable
from weightops.tasks.task import SPLITS
from weightops.workflows.base import OnMeasured, Workflow
from weightops.workflows.folder import write_folder
from weightops.workflows.plan import plan_run, work_of
from weightops.workflows.result import confirm
from weightops.workflows.summary import settings, summarize

log = logging.getLogger("weightops")


def run(
    workflow: Workflow,
    out: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    on_measured: OnMeasured | None = None,
) -> dict[str, Any]:
    """Run a workflow and write its folder.

    Args:
        workflow: the workflow.
        out: the folder; it appears whole, at the end.
        resume: resume a run that was killed or interrupted.
        overwrite: replace an output that exists.
        on_measured: called with each edit that a search has measured in full.

    Returns:
        The content of ``summary.json``.

    Raises:
        OutputError: if ``out`` exists, or the disk is full.
        NothingSatisfiesError: if no coefficient satisfies the constraint; nothing is written.
    """
    out = Path(out)
    finished = _finished(workflow, out) if resume and not overwrite else None
    if finished is not None:
        log.info("%s is finished", out)
        return finished
    _check(workflow, out, overwrite=overwrite)
    with reserved(out, overwrite=overwrite), job(workflow.verb, work_of(workflow)) as whole:
        return _run(workflow, out, resume, overwrite, on_measured, whole)


def _finished(workflow: Workflow, out: Path) -> dict[str, Any] | None:
    """Return the summary of a run that is finished; None if the folder holds no such run."""
    if not (out / "summary.json").is_file():
        return None
    summary = read_json(out / "summary.json")
    asked = jsonable(portable(settings(workflow)))
    same = asked == {key: summary.get(key) for key in asked}
    tasks = summary.get("tasks", {})
    told = [(name, entry.get("source"), entry.get("class_order")) for name, entry in tasks.items()]
    wanted = [(task.name, portable(task.source), task.class_order) for task in workflow.roles]
    return summary if same and told == wanted else None


def _run(
    workflow: Workflow,
    out: Path,
    resume: bool,
    overwrite: bool,
    on_measured: OnMeasured | None,
    whole: Job,
) -> dict[str, Any]:
    work_folder = _work_folder(out, resume=resume)
    started = time.monotonic()
    try:
        session = EditSession(
            workflow.checkpoint,
            workflow.tasks,
            config=workflow.config,
            device=workflow.device,
            precision=workflow.precision,
            batchnorm=workflow.batchnorm,
            work_folder=work_folder,
            resume=resume,
            on_measured=on_measured,
        )
        _prepare(workflow, session)
        result = workflow.find(session)
        searched = time.monotonic() - started - session.finetuning_seconds
        has_base = workflow.compared_with == "base"
        whole.left((1 + has_base + len(result.rivals)) * workflow.size("test"))
        test = confirm(session, result, workflow.word, with_base=has_base)
        seconds = {
            "finetune": session.finetuning_seconds,
            "sweep": searched,
            "total": time.monotonic() - started,
        }
        summary = summarize(workflow, session, result, test, seconds, out)
        whole.at("writing")
        with atomic_output(out, overwrite=overwrite) as folder:
            folder.mkdir()
            write_folder(folder, workflow, session, result, test, summary)
    except (NothingSatisfiesError, OptionError):
        shutil.rmtree(work_folder, ignore_errors=True)
        raise  # after any other error, what was learned stays, to be resumed
    shutil.rmtree(work_folder, ignore_errors=True)
    return summary


def _check(workflow: Workflow, out: Path, *, overwrite: bool) -> None:
    """Refuse what would fail after the fine-tuning: an output or a disk."""
    check_free(out, overwrite=overwrite)
    plan = plan_run(workflow, out)
    if plan.free_bytes < plan.output_bytes:
        raise OutputError(
            f"{out} needs about {plan.output_bytes / 1e6:.0f} MB while it is made, and "
            f"{plan.free_bytes / 1e6:.0f} MB are free"
        )


def _prepare(workflow: Workflow, session: EditSession) -> None:
    """Read all samples, which refuses before the fine-tuning what can't be read."""
    splits = [(task, split) for task in workflow.tasks for split in SPLITS[1:]]
    splits += [(task, "train") for task in dict.fromkeys(workflow.to_train)]
    session.scoring.prepare(session.model, splits)


def _work_folder(out: Path, *, resume: bool) -> Path:
    """Return the folder for what fine-tuning leaves; without ``resume`` it is emptied."""
    folder = out.with_name(f".{out.name}.run")
    if not resume and folder.exists():
        log.warning("an interrupted run is started again; resume=True would have resumed it")
        shutil.rmtree(folder, ignore_errors=True)
    return folder
