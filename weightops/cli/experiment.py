"""``weightops experiment``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from weightops.cli import options


@click.command()
@click.argument("name", required=False)
@click.option(
    "--task", default=None, help="What it is about, instead of the experiment's own task."
)
@options.model
@options.training
@options.seed
@options.device
@click.option("--dry-run", is_flag=True, help="Say what would be done, and do nothing.")
@options.folder("Folder for the results. Default: experiment-NAME.")
@options.printing
def command(
    name: str | None,
    out: Path | None,
    dry_run: bool,
    overwrite: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Run an experiment of the papers and write its table and picture; without a name, list them."""
    from inspect import getdoc

    from weightops.workflows.experiments import EXPERIMENTS, plan_experiment, run_experiment

    if name is None:
        listed = {
            key: (getdoc(function) or "").partition("\n")[0]
            for key, function in EXPERIMENTS.items()
        }
        options.echo_json(listed) if as_json else click.echo(
            "\n".join(f"{key:16} {text}" for key, text in listed.items())
        )
        return
    out = out or Path(f"experiment-{name}")
    if dry_run:
        options.echo_plan(plan_experiment(name, out, **settings), as_json)
        return
    outcome = run_experiment(name, out, overwrite=overwrite, **settings)
    if as_json:
        options.echo_json(outcome.record)
        return
    click.echo(f"{outcome.text}\n\n{out}/ holds table.txt, results.json and figure.png")
