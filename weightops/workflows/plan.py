"""Say what a run of a workflow would do and what it takes, before it does anything."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from weightops.checkpoints.opening import open_any
from weightops.evaluation.units import SCORE
from weightops.training.config import TrainingConfig
from weightops.training.training_loop import step_work
from weightops.workflows.base import Workflow


@dataclass(frozen=True)
class Plan:
    """The plan of a run.

    Attributes:
        verb: the workflow's verb.
        model: ref of the model to edit.
        tasks: task name -> its role.
        learned: the tasks that are fine-tuned on.
        alphas: the coefficients to try.
        search: the strategy of the search.
        config: the recipe of fine-tuning.
        training_samples: images or blocks of text that fine-tuning sees.
        evaluated_samples: about how many are scored; None if only a program knows.
        output: the folder.
        output_bytes: bytes that the run needs on the disk while it is made.
        free_bytes: bytes that are free there.
    """

    verb: str
    model: str
    tasks: Mapping[str, str]
    learned: tuple[str, ...]
    alphas: tuple[float, ...]
    search: str
    config: TrainingConfig
    training_samples: int
    evaluated_samples: int | None
    output: str
    output_bytes: int
    free_bytes: int


def plan_run(workflow: Workflow, out: Path) -> Plan:
    """Return the plan of a workflow's run into a folder.

    Raises:
        CheckpointError: if weights or vectors that are given can't be opened.
    """
    for given in workflow.finetuned:
        if isinstance(given, (str, Path)):
            open_any(given)
    config = workflow.config
    trainings = len(workflow.to_train)
    # The model and the vectors; for each fine-tuning its weights, and its state of twice the size.
    copies = 2 + len(workflow.learned) + 3 * trainings
    model_bytes = sum(spec.numel * 4 for spec in workflow.checkpoint.specs.values())
    parent = next(folder for folder in out.absolute().parents if folder.exists())
    return Plan(
        verb=workflow.verb,
        model=workflow.checkpoint.ref,
        tasks={task.name: role for task, role in workflow.roles.items()},
        learned=tuple(task.name for task in workflow.learned),
        alphas=tuple(workflow.signed_alphas),
        search=workflow.search.strategy,
        config=config,
        training_samples=trainings * config.steps * config.batch_size,
        evaluated_samples=None if workflow.unit is SCORE else evaluated_samples(workflow),
        output=str(out),
        output_bytes=copies * model_bytes,
        free_bytes=shutil.disk_usage(parent).free,
    )


def evaluated_samples(workflow: Workflow) -> int:
    """Return about how many samples are scored; of programs, how many runs there are."""
    validation, test = (
        len({task.source for task in tasks})
        if workflow.unit is SCORE
        else sum(workflow.count(task, split) for task in tasks)
        for split, tasks in (("validation", workflow.searched), ("test", workflow.tasks))
    )
    return workflow.candidates * validation + 3 * test


def work_of(workflow: Workflow) -> float:
    """Return about how much work a run is, in samples that are scored, or in runs of a program."""
    training = len(workflow.to_train) * workflow.config.steps * step_work(workflow.config)
    return training + evaluated_samples(workflow)
