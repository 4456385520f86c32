"""``weightops finetune``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from weightops.cli.borrowing import FINETUNING, taken, training_config
from weightops.cli.config_files import write_run_file
from weightops.cli.from_signature import Borrowed, command
from weightops.cli.learning import TASK, TEXT, check_one
from weightops.cli.printing import echo_plan
from weightops.cli.types import NodeOf

_NODE = click.Option(
    ["--node"],
    type=NodeOf(),
    help="Which node of how many this is (lo-fi): 0/4, 1/4, 2/4 or 3/4. Default output: nodeINDEX.",
)


@command(
    FINETUNING,
    Borrowed(
        "weightops.training.finetune:finetune",
        only=("checkpoint_every", "resume", "overwrite", "device", "precision", "log_to"),
    ),
    Borrowed("weightops.training.nodes:Node", only=("data",), names={"data": "node_data"}),
    arguments=[TASK, TEXT, _NODE],
)
def finetune(
    *,
    model: str = "embedded",
    out: Path | None = None,
    dry_run: bool = False,
    json_: bool = False,
    **given: Any,
) -> None:
    """Fine-tune a model on a task or a text.

    What learns is the image encoder of a CLIP model, under the frozen zero-shot head; or all of a
    classifier of timm, or of a language model of transformers.

    Args:
        model: a path to a model with its configuration, or a ref.
        out: the folder for the weights and the log. Default: finetuned-TASK.
        dry_run: say what would be done, and do nothing.
    """
    from weightops.checkpoints.opening import open_checkpoint
    from weightops.tasks.table import as_task
    from weightops.training.nodes import Node
    from weightops.training.run_folder import WEIGHTS

    check_one(given)
    learned = taken(given, ("task", "text"))
    index, count = given.get("node", (0, 1))
    node = Node(index, count, given.pop("node_data", Node.data))
    name = learned["text"].stem if "text" in learned else as_task(learned["task"]).name
    default = f"node{index}" if "node" in given else f"finetuned-{name.replace(':', '-')}"
    out = out or Path(default)
    checkpoint = open_checkpoint(model)
    config = training_config(checkpoint, given)
    plan = {
        "model": checkpoint.ref,
        "task": str(next(iter(learned.values()))),
        **asdict(config),
        "output": str(out / WEIGHTS),
    }
    if given.pop("node", None):
        samples = config.steps * node.batch_size(config.batch_size)
        plan |= {"node": f"{index}/{count}", "node_data": node.data, "samples": samples}
    if not dry_run:
        tuned = _learn(checkpoint, config, out=out, node=node, **learned, **given)
        plan["fingerprint"] = tuned.source.fingerprint
        write_run_file(out)
    echo_plan(plan, json_)


def _learn(
    checkpoint: Any,
    config: Any,
    *,
    task: str | None = None,
    text: Path | None = None,
    device: str = "auto",
    precision: Any = "auto",
    **how: Any,
) -> Any:
    """Fine-tune on a task, or a language model on a text."""
    from weightops.training import finetune as module
    from weightops.training.learners import TextLearner

    if task is not None:
        return module.finetune(checkpoint, task, config, device=device, precision=precision, **how)
    assert text is not None
    learner = TextLearner(checkpoint, text, device=device, precision=precision)
    return module.fit(learner, config, **how)
