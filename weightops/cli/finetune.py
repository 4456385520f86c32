"""``weightops finetune``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from weightops.cli import options


@click.command()
@click.option("--task", required=True, type=options.OneTask(), help="What to learn.")
@options.model
@options.training
@options.seed
@options.device
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    default=None,
    help="Folder for the weights and the log. Default: finetuned-TASK.",
)
@click.option(
    "--checkpoint-every",
    type=click.IntRange(1),
    default=500,
    show_default=True,
    help="Steps between states to resume from.",
)
@click.option("--resume", is_flag=True, help="Go on from the last state in the folder.")
@click.option("--dry-run", is_flag=True, help="Say what would be done, and do nothing.")
@options.writing
@options.printing
def command(
    task: str,
    model: str,
    out: Path | None,
    checkpoint_every: int,
    resume: bool,
    dry_run: bool,
    overwrite: bool,
    as_json: bool,
    device: str,
    **training: Any,
) -> None:
    """Fine-tune the image encoder on a task, under the frozen zero-shot head."""
    from weightops.checkpoints.checkpoint import open_checkpoint
    from weightops.finetuning import WEIGHTS, config_for, finetune
    from weightops.tasks.table import find_task

    out = out or Path(f"finetuned-{find_task(task).name.replace(':', '-')}")
    checkpoint = open_checkpoint(model)
    config = config_for(checkpoint, **training)
    plan = {"model": checkpoint.ref, "task": task, **asdict(config), "output": str(out / WEIGHTS)}
    if not dry_run:
        finetuned = finetune(
            checkpoint,
            task,
            config,
            out=out,
            checkpoint_every=checkpoint_every,
            resume=resume,
            overwrite=overwrite,
            device=device,
        )
        plan["fingerprint"] = finetuned.source.fingerprint
    if as_json:
        options.echo_json(plan)
    else:
        click.echo("\n".join(f"{name.replace('_', ' '):17} {value}" for name, value in plan.items()))
