"""``weightops experiment``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from weightops.cli.borrowing import TRAINING, training_config
from weightops.cli.config_files import write_run_file
from weightops.cli.from_signature import Borrowed, command
from weightops.cli.printing import echo, echo_json, echo_plan
from weightops.cli.types import TaskNames

_TASK = click.Option(
    ["--task"], type=TaskNames(), help="The task to run it on, instead of the experiment's own."
)


@command(
    Borrowed("weightops.workflows.experiments:run_experiment", leave_out=("name", "task")),
    TRAINING,
    arguments=[_TASK],
    optional=("out",),
)
def experiment(name: str = "", *, dry_run: bool = False, json_: bool = False, **given: Any) -> None:
    """Run an experiment of the papers, and write its table and picture.

    Without a name, the experiments are listed.

    Args:
        name: the experiment.
        dry_run: say what would be done, and do nothing.
    """
    from weightops.workflows.experiments import (
        EXPERIMENTS,
        about_experiment,
        plan_experiment,
        run_experiment,
    )

    if not name:
        listed = {key: about_experiment(function) for key, function in EXPERIMENTS.items()}
        lines = [f"{key:16} {text}" for key, text in listed.items()]
        echo_json(listed) if json_ else echo("\n".join(lines))
        return
    if "task" in given:
        given["task"] = ",".join(given["task"])
    out = given.pop("out", None) or Path(f"experiment-{name}")
    given["training"] = training_config(given.get("model", "embedded"), given)
    if dry_run:
        given.pop("overwrite", None)
        echo_plan(plan_experiment(name, out, **given), json_)
        return
    outcome = run_experiment(name, out, **given)
    write_run_file(out)
    if json_:
        echo_json(outcome.record)
        return
    echo(f"{outcome.text}\n\n{out}/ holds report.html, table.txt, results.json and the picture")
