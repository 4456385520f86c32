"""Commands of the workflows: run one and print what it measures, or say what it would do."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from weightops.cli.borrowing import SCORED, SEARCH, TRAINING, search_options, taken, training_config
from weightops.cli.from_signature import Borrowed, build
from weightops.cli.printing import echo, echo_json, echo_plan, show
from weightops.cli.pushing import PUSHING, check_known_license, check_push, push_folder
from weightops.cli.signatures import read

if TYPE_CHECKING:
    from weightops.search.session import Measured
    from weightops.workflows.base import Workflow

DRY_RUN = click.Option(["--dry-run"], is_flag=True, help="Say what would be done, and do nothing.")


def workflow_command(
    reference: str,
    folder: Callable[[Any], Sequence[str]],
    *,
    arguments: Sequence[click.Parameter] = (),
    prepare: Callable[[dict[str, Any]], None] = lambda given: None,
    leave_out: Sequence[str] = (),
    optional: Sequence[str] = (),
) -> click.Command:
    """Return the command of a workflow's function.

    Args:
        reference: ``module:function``.
        folder: gives the parts of the default output's name, from the workflow.
        arguments: further click parameters.
        prepare: changes the given values, for what the command line says otherwise than Python.
        leave_out: parameters that aren't options.
        optional: parameters that need not be given.
    """
    signature = read(reference)
    names = [parameter.name for parameter in signature.parameters]
    options = Borrowed(reference, leave_out=leave_out).options(optional=("out", *optional))
    options += SCORED.options()
    options += SEARCH.options() if "search" in names else []
    options += TRAINING.options() if "training" in names else []

    def run(json_: bool = False, **given: Any) -> None:
        prepare(given)
        _check_training(given)
        how = taken(given, ("out", "resume", "overwrite", "dry_run", "push", "license"))
        if "search" in names:
            given["search"] = search_options(given)
        if "training" in names:
            given["training"] = training_config(given.get("model", "embedded"), given)
        workflow = _workflow_of(reference).from_call(**given)
        out = how.pop("out", None) or Path(_file_name(folder(workflow)))
        _run(workflow, out, as_json=json_, **how)

    verb = reference.partition(":")[2]
    return build(verb, run, [*options, *arguments, DRY_RUN, *PUSHING], signature.docstring.text)


def _workflow_of(reference: str) -> type[Workflow]:
    """Return the workflow that a function runs."""
    from weightops.workflows.base import Workflow

    module, _, verb = reference.partition(":")
    members = vars(import_module(module)).values()
    classes = [m for m in members if isinstance(m, type) and issubclass(m, Workflow)]
    return next(cls for cls in classes if getattr(cls, "verb", None) == verb)


def _check_training(given: Mapping[str, Any]) -> None:
    """Refuse options of a fine-tuning that there won't be."""
    unused = [
        f"--{name.replace('_', '-')}" for name in ("steps", "lr", "batch_size") if name in given
    ]
    learns = not given.get("finetuned") or given.get("baselines") or given.get("supervised")
    if unused and not learns:
        raise click.UsageError(f"{', '.join(unused)}: nothing is fine-tuned with --finetuned")


def _file_name(parts: Sequence[str]) -> str:
    return "-".join(parts).replace(":", "-").replace(" ", "-")


def _run(
    workflow: Workflow,
    out: Path,
    *,
    as_json: bool,
    dry_run: bool = False,
    push: str | None = None,
    license: str | None = None,
    **how: Any,
) -> None:
    """Run a workflow, printing what it measures, or print its plan."""
    from weightops.workflows.plan import plan_run
    from weightops.workflows.run import run

    known = workflow.checkpoint.architecture
    check_push(push, license, dry_run=dry_run)
    check_known_license(push, license, [known.folder] if known else [])
    if dry_run:
        echo_plan(asdict(plan_run(workflow, out)), as_json)
        return
    if as_json:
        summary = run(workflow, out, **how)
        echo_json({**summary, **push_folder(out, push, license)})
        return
    table = _Table(workflow)
    summary = run(workflow, out, on_measured=table.print_measured, **how)
    table.print_summary(summary)
    seconds = summary["seconds"]
    echo(
        f"\n{out}/ holds the model, report.html and the results ({seconds['total']:.0f} s, of "
        f"which fine-tuning {seconds['finetune']:.0f})"
    )
    push_folder(out, push, license)


class _Table:
    """The printed table: a column for each task, and one for the mean of those to be kept."""

    def __init__(self, workflow: Workflow) -> None:
        self._workflow = workflow
        self._unit = workflow.unit
        self._names = [task.name for task in workflow.tasks]
        self._kept = list(workflow.view.keep)
        roles = [role for task, role in workflow.roles.items() if task.name in self._kept]
        self._mean = roles[:1] if len(self._kept) > 1 else []
        columns = [max(len(name), 5) for name in [*self._names, *self._mean]]
        self._widths = [max(9, 5 * len(workflow.learned)), *columns]
        self._has_heading = False

    def print_measured(self, measured: Measured) -> None:
        """Print a row of validation scores; before the first one, the heading."""
        from weightops.search.goal import shown
        from weightops.support.progress import set_aside

        set_aside()
        if not self._has_heading:
            echo(f"validation {self._unit.title}")
            self._print_heading("alpha")
            self._has_heading = True
        self._print_row(shown(measured.coefficients), measured.scores)

    def print_summary(self, summary: Mapping[str, Any]) -> None:
        """Print the choice, the test scores of all models, the edit last, and remarks."""
        echo(f"\nalpha {show(summary['alpha'])}: {summary['why']}\n\ntest {self._unit.title}")
        self._print_heading("")
        tasks, word = summary["tasks"], self._workflow.word
        entries = [entry for task in tasks.values() for entry in task.items()]
        models = dict.fromkeys(name for name, scores in entries if isinstance(scores, Mapping))
        for model in [*(name for name in models if name != word), word]:
            scores = {name: task[model] for name, task in tasks.items() if model in task}
            self._print_row(model, scores)
        for text in self._workflow.remarks(summary):
            echo(f"\n{text}")

    def _print_heading(self, first: str) -> None:
        from weightops.reports.table import line

        echo(line([first, *self._names, *self._mean], self._widths))

    def _print_row(self, first: str, scores: Mapping[str, Mapping[str, Any]]) -> None:
        from weightops.reports.table import line

        unit = self._unit
        readings = {name: unit.of(metrics) for name, metrics in scores.items()}
        cells = [unit.cell(readings[name]) if name in readings else "-" for name in self._names]
        if self._mean:
            kept = [readings[name] for name in self._kept if name in readings]
            complete = len(kept) == len(self._kept)
            cells.append(unit.cell(unit.mean(kept)) if complete else "-")
        echo(line([first, *cells], self._widths))
