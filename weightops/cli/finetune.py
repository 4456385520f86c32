"""``weightops finetune``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from weightops.cli import options


@click.command()
@options.learning
@options.model
@options.training
@options.seed
@options.device
@options.folder("Folder for the weights and the log. Default: finetuned-TASK.")
@click.option(
    "--node",
    type=options.NodeOf(),
    default=None,
    help="Which node of how many this is (lo-fi): 0/4, 1/4, 2/4 or 3/4. Default output: nodeINDEX.",
)
@options.node_data
@click.option(
    "--ema",
    type=click.FloatRange(0, 1, max_open=True),
    default=None,
    help="Also keep the weights' moving average, of this decay.",
)
@options.checkpoints
@click.option("--dry-run", is_flag=True, help="Say what would be done, and do nothing.")
@options.printing
def command(
    task: str | None,
    text: Path | None,
    model: str,
    out: Path | None,
    node: tuple[int, int] | None,
    node_data: str,
    checkpoint_every: int,
    resume: bool,
    dry_run: bool,
    overwrite: bool,
    as_json: bool,
    device: str,
    **training: Any,
) -> None:
    """Fine-tune the image encoder of a CLIP model under the frozen zero-shot head, a classifier of timm, or a language model."""
    from weightops.checkpoints.opening import open_checkpoint
    from weightops.tasks.table import find_task
    from weightops.training.config import config_for
    from weightops.training.finetune import finetune, fit
    from weightops.training.learners import TextLearner
    from weightops.training.nodes import Node
    from weightops.training.run_folder import WEIGHTS

    options.one_of(task, text)
    index, count = node or (0, 1)
    name = text.stem if text else find_task(task or "").name.replace(":", "-")
    out = out or Path(f"node{index}" if node else f"finetuned-{name}")
    checkpoint = open_checkpoint(model)
    config = config_for(checkpoint, **training)
    share = Node(index, count, node_data)  # type: ignore[arg-type]
    plan = {
        "model": checkpoint.ref,
        "task": task or str(text),
        **asdict(config),
        "output": str(out / WEIGHTS),
    }
    if node:
        plan |= {
            "node": f"{index}/{count}",
            "node_data": node_data,
            "samples": config.steps * share.batch_size(config.batch_size),
        }
    if not dry_run:
        run: dict[str, Any] = {
            "out": out,
            "checkpoint_every": checkpoint_every,
            "resume": resume,
            "overwrite": overwrite,
            "node": share,
        }
        if task is not None:
            finetuned = finetune(checkpoint, task, config, device=device, **run)
        else:
            finetuned = fit(TextLearner(checkpoint, text, device=device), config, **run)  # type: ignore[arg-type]
        plan["fingerprint"] = finetuned.source.fingerprint
    options.echo_plan(plan, as_json)
