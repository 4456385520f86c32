"""lo-fi: fine-tune nodes that don't communicate, and average their weights (arXiv 2210.11948)."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Annotated

from weightops.algebra.precision import Precision
from weightops.checkpoints.checkpoint import Checkpoint
from weightops.checkpoints.opening import CheckpointLike
from weightops.errors import NonfiniteError, OptionError
from weightops.support.atomic import check_free
from weightops.support.calls import repeatable
from weightops.support.progress import job
from weightops.support.ranges import Range
from weightops.tasks.table import TaskLike, as_task
from weightops.training.config import TrainingConfig, config_for
from weightops.training.finetune import fit, learner_for
from weightops.training.learners import Learner
from weightops.training.lofi_average import (
    DIVERGED,
    GONE,
    RECORD,
    Average,
    average,
    average_folders,
    survey,
)
from weightops.training.lofi_meeting import Meeting
from weightops.training.nodes import Node, OneProcess
from weightops.training.process_groups import LofiNode
from weightops.training.run_folder import CHECKPOINT_EVERY
from weightops.training.training_loop import step_work

__all__ = ["DIVERGED", "GONE", "RECORD", "Average", "average", "run", "survey"]


@repeatable("lofi.run")
def run(
    task: TaskLike | Learner,
    out: str | Path,
    *,
    model: CheckpointLike = "embedded",
    training: TrainingConfig | None = None,
    strategy: OneProcess | None = None,
    nodes: Annotated[int, Range(min=1)] | None = None,
    like: Node | None = None,
    checkpoint_every: Annotated[int, Range(min=1)] = CHECKPOINT_EVERY,
    resume: bool = False,
    overwrite: bool = False,
    device: str = "auto",
    precision: Precision = "auto",
    log_to: str | None = None,
) -> Average | None:
    """Fine-tune nodes into ``out/node0``, ``out/node1``, ..., and write their average.

    The average is in ``out/merged``. Under torchrun, this process is part of one node (see
    `connected`), and nodes send nothing to each other until they are finished. Then those that
    still answer exchange their tensors once. If a node is gone, the saved checkpoints are averaged,
    where all nodes see them. Without torchrun, one node is trained after another.

    Args:
        task: what to learn: a name, a folder, a `Task`, or a `Learner`, which has its own model.
        out: folder for the nodes and their average.
        model: the model that all nodes start from, if ``task`` isn't a learner.
        training: the recipe; its batch size is that of all nodes together. Default: that of
            `config_for`.
        strategy: this process's node, from `connected`. Default: this process alone.
        nodes: number of nodes, one after another; only without torchrun.
        like: how the nodes work together; its index and count aren't used.
        checkpoint_every: steps between states that a killed run can be resumed from.
        resume: continue each node from its last state; finished nodes stay as they are.
        overwrite: replace nodes and an average that exist; with ``resume``, only nodes of a run
            with other arguments.
        device: "auto", "cpu", "cuda", "cuda:1", ...
        precision: as for `finetune`; a learner has its own.
        log_to: where the log goes as well: tensorboard (or tensorboard:FOLDER), wandb (or
            wandb:PROJECT), or jsonl:PATH.

    Returns:
        The average in the process that wrote it, None in others.

    Raises:
        OptionError: if the number of nodes is missing, or contradicts torchrun's.
        NonfiniteError: if no node has finite weights.
    """
    out, strategy, like = Path(out), strategy or OneProcess(), like or Node()
    count = _count_of_nodes(strategy, nodes)
    check_free(out / "merged", overwrite=overwrite or resume)
    learner = (
        task
        if isinstance(task, Learner)
        else learner_for(model, as_task(task), training, device, precision)
    )
    config = training or config_for(learner.base)
    indices = [strategy.index] if isinstance(strategy, LofiNode) else range(count)
    own = {index: replace(like, index=index, count=count) for index in indices}
    finished: dict[int, Checkpoint] = {}
    with job(
        "lo-fi", config.steps * sum(step_work(config, node) for node in own.values())
    ) as whole:
        for index, node in own.items():
            whole.at(f"node {index} of {count}")
            learner.base.load_into(learner.module)
            with suppress(NonfiniteError):
                finished[index] = fit(
                    learner,
                    config,
                    out=out / f"node{index}",
                    checkpoint_every=checkpoint_every,
                    resume=resume,
                    overwrite=overwrite,
                    log_to=log_to,
                    node=node,
                    strategy=strategy,
                )
    if strategy.rank:
        return None
    if isinstance(strategy, LofiNode):
        tuned = finished.get(strategy.index)
        node = own[strategy.index]
        samples = config.steps * node.batch_size(config.batch_size) if tuned else 0
        meeting = Meeting(out, strategy, samples, config.steps, like.only)
        state = tuned.state_dict() if tuned else learner.blank()
        return meeting.average(state, learner.base.architecture)
    diverged = [index for index in own if index not in finished]
    merged = average_folders(out, count, diverged, like.only)
    merged.save(out / "merged", overwrite=True)
    return merged


def _count_of_nodes(strategy: OneProcess, nodes: int | None) -> int:
    started = strategy.count if isinstance(strategy, LofiNode) else None
    count = started if nodes is None else nodes
    if count is None:
        raise OptionError(
            "the number of nodes is missing",
            hint="give the number with nodes=, or start the nodes with torchrun",
        )
    if count < 1:
        raise OptionError(f"nodes is {count}, and must be at least 1")
    if started not in (None, count):
        raise OptionError(
            f"nodes is {nodes}, and torchrun started {started}", hint="leave nodes= out"
        )
    return count
