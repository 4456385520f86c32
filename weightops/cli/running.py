"""What the verbs that run a workflow share: their options, and what they print."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click

from weightops.cli import options

if TYPE_CHECKING:
    from weightops.search.session import Measured
    from weightops.workflows.base import Workflow

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Run:
    """Where a workflow's results go, and how it is run."""

    out: Path | None
    dry_run: bool
    overwrite: bool
    push: str | None
    as_json: bool
    resume: bool = False


def run_options(default_out: str) -> Callable[[F], F]:
    """The options of a `Run`, which the verb gets as ``run``; ``default_out`` is its folder where none is named."""

    def decorate(function: F) -> F:
        @wraps(function)
        def gathered(**given: Any) -> Any:
            own = {
                field.name: given.pop(field.name) for field in fields(Run) if field.name in given
            }
            return function(run=Run(**own), **given)

        decorated: Any = gathered
        for option in (
            options.printing,
            click.option("--dry-run", is_flag=True, help="Say what would be done, and do nothing."),
            options.pushing,
            options.folder(f"Folder for the results. Default: {default_out}."),
        ):
            decorated = option(decorated)
        return cast(F, decorated)

    return decorate


def running(default_out: str) -> Callable[[F], F]:
    """The options of a run that fine-tunes."""

    def decorate(function: F) -> F:
        function = run_options(default_out)(function)
        for option in (
            click.option(
                "--resume",
                is_flag=True,
                help="Go on from where a killed or interrupted run stopped.",
            ),
            options.device,
            options.seed,
            options.training,
        ):
            function = option(function)
        return function

    return decorate


def searching(function: F) -> F:
    """``--alphas`` and ``--search``."""
    function = click.option(
        "--search",
        type=click.Choice(["grid", "race", "cma"]),
        default="grid",
        show_default=True,
        help="race drops hopeless alphas early, on few images: cheaper, and fewer points in the picture; "
        "cma is for several alphas that depend on each other.",
    )(function)
    return click.option(
        "--alphas",
        type=options.Alphas(),
        default="0:1:0.05",
        show_default=True,
        help="Coefficients to try; 0 is always among them.",
    )(function)


def given(function: F) -> F:
    """``--finetuned``, ``--vector``."""
    return click.option(
        "--finetuned",
        "--vector",
        "finetuned",
        multiple=True,
        metavar="PATH",
        help="Weights, or a saved task vector, to use instead of fine-tuning; once for each task, in their order.",
    )(function)


def check_training(settings: Mapping[str, Any]) -> None:
    """Refuse options of a fine-tuning that won't be."""
    unused = [
        f"--{name.replace('_', '-')}"
        for name in ("steps", "lr", "batch_size")
        if settings[name] is not None
    ]
    if settings["finetuned"] and unused:
        raise click.UsageError(f"{', '.join(unused)}: nothing is fine-tuned with --finetuned")


def go(workflow: Workflow, run: Run, default_out: str) -> None:
    """Run a workflow, printing what it measures, or say what it would do."""
    from weightops.hub.push import check_push
    from weightops.reports.table import cell, line
    from weightops.search.goal import shown

    out = run.out or Path(default_out.replace(":", "-").replace(" ", "-"))
    if run.dry_run:
        options.echo_plan(asdict(workflow.plan(out)), run.as_json)
        return
    if run.push:
        check_push(run.push)
    names = [task.name for task in workflow.tasks]
    kept = list(workflow.view.keep)
    extra = (
        [next(role for task, role in workflow.roles.items() if task.name in kept)]
        if len(kept) > 1
        else []
    )
    widths = [max(9, 5 * len(workflow.learned)), *(max(len(name), 5) for name in [*names, *extra])]

    def row(first: str, scores: Mapping[str, Mapping[str, Any]]) -> None:
        cells = [cell(float(scores[name]["acc1"])) if name in scores else "-" for name in names]
        whole = extra and all(name in scores for name in kept)
        mean = [
            cell(sum(float(scores[name]["acc1"]) for name in kept) / len(kept)) if whole else "-"
            for _ in extra
        ]
        click.echo(line([first, *cells, *mean], widths))

    headings = ["validation accuracy (%)", line(["alpha", *names, *extra], widths)]

    def show(measured: Measured) -> None:
        while headings:  # not before there is something to show
            click.echo(headings.pop(0))
        row(shown(measured.coefficients), measured.scores)

    shows = {} if run.as_json else {"on_measured": show}
    summary = workflow.run(out, resume=run.resume, overwrite=run.overwrite, **shows)
    if run.as_json:
        options.echo_json({**summary, **options.pushed(out, run.push)})
        return
    click.echo(f"\nalpha {options.shown(summary['alpha'])}: {summary['why']}\n\ntest accuracy (%)")
    click.echo(line(["", *names, *extra], widths))
    tasks = summary["tasks"]
    models = dict.fromkeys(
        which for task in tasks.values() for which, m in task.items() if isinstance(m, Mapping)
    )
    for which in [*(m for m in models if m != workflow.word), workflow.word]:
        row(which, {name: task[which] for name, task in tasks.items() if which in task})
    for text in workflow.remarks(summary):
        click.echo(f"\n{text}")
    seconds = summary["seconds"]
    click.echo(
        f"\n{out}/ holds the model, report.html and the results ({seconds['total']:.0f} s, of which fine-tuning {seconds['finetune']:.0f})"
    )
    options.pushed(out, run.push)
