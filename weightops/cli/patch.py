"""``weightops patch``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from weightops.cli import options


@click.command()
@click.option("--task", required=True, type=options.OneTask(), help="What to patch.")
@options.model
@click.option(
    "--supported", type=options.TaskNames(), default=None, help="What must not get worse. Default: all rendered tasks."
)
@click.option(
    "--alphas",
    type=options.Alphas(),
    default="0:1:0.05",
    show_default=True,
    help="Coefficients to try; 0 and 1 are always among them.",
)
@click.option(
    "--rule",
    type=click.Choice(["patching", "mean"]),
    default="patching",
    show_default=True,
    help="How alpha is chosen: see the text above.",
)
@click.option(
    "--max-supported-drop",
    type=click.FloatRange(0, 1),
    default=0.01,
    show_default=True,
    help="For --rule patching; 0.01 is one point.",
)
@click.option("--finetuned", default=None, help="Weights to use instead of fine-tuning.")
@options.training
@options.seed
@options.device
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), default=None, help="Folder for the results. Default: patched-TASK."
)
@click.option("--resume", is_flag=True, help="Go on from where a killed or interrupted run stopped.")
@click.option("--dry-run", is_flag=True, help="Say what would be done, and do nothing.")
@options.writing
@options.printing
def command(
    task: str, out: Path | None, resume: bool, dry_run: bool, overwrite: bool, as_json: bool, **settings: Any
) -> None:
    r"""Make a model better at one task without making it worse at others (PAINT, arXiv 2208.05592).

    Fine-tunes on the task under the frozen zero-shot head, tries (1 - alpha) base + alpha finetuned for one alpha after
    another on validation data, chooses one, confirms it once on test data, and writes the patched model, results.jsonl,
    summary.json and frontier.png.

    \b
    --rule patching  the best patching accuracy that keeps the supported mean, with 95 % confidence,
                     within --max-supported-drop of the base's
    --rule mean      the best mean of patching accuracy and supported mean
    """
    from weightops.patching import Patch, Sweep
    from weightops.reports.table import cell, line

    out = out or Path(f"patched-{task}")
    unused = [f"--{name.replace('_', '-')}" for name in ("steps", "lr", "batch_size") if settings[name] is not None]
    if settings["finetuned"] and unused:
        raise click.UsageError(f"{', '.join(unused)}: nothing is fine-tuned with --finetuned")
    run = Patch(task, **settings)
    if dry_run:
        plan = asdict(run.plan(out))
        if as_json:
            options.echo_json(plan)
        else:
            for name, value in plan.items():
                click.echo(
                    f"{name.replace('_', ' '):17} {', '.join(map(str, value)) if isinstance(value, tuple) else value}"
                )
        return
    names = [t.name for t in run.tasks]
    widths = [5, *(max(len(name), 5) for name in names), 9]

    def show(sweep: Sweep) -> None:
        supported = [float(sweep.scores[name]["acc1"]) for name in names[1:]]
        click.echo(
            line(
                [
                    f"{sweep.alpha:g}",
                    *(cell(float(sweep.scores[name]["acc1"])) for name in names),
                    cell(sum(supported) / len(supported)),
                ],
                widths,
            )
        )

    if not as_json:
        click.echo("validation accuracy (%)")
        click.echo(line(["alpha", *names, "supported"], widths))
    summary = run.run(out, resume=resume, overwrite=overwrite, **({} if as_json else {"on_sweep": show}))
    if as_json:
        options.echo_json(summary)
        return
    click.echo(f"\nalpha {summary['alpha']:g}: {summary['why']}\n\ntest accuracy (%)")
    click.echo(line(["", *names, "supported"], [9, *widths[1:]]))
    for which in ("base", "finetuned", "patched"):
        scores = [float(summary["tasks"][name][which]["acc1"]) for name in names]
        mean = sum(scores[1:]) / len(scores[1:])
        click.echo(line([which, *map(cell, scores), cell(mean)], [9, *widths[1:]]))
    seconds = summary["seconds"]
    click.echo(
        f"\n{out}/ holds the patched model, frontier.png and the results ({seconds['total']:.0f} s, of which fine-tuning {seconds['finetune']:.0f})"
    )
