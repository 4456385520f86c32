"""Settings of an experiment: the model, the task and the recipe that it runs on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from weightops.checkpoints.checkpoint import Checkpoint
from weightops.evaluation.units import ACCURACY
from weightops.search.session import EditSession, Measured
from weightops.support.progress import left
from weightops.tasks.task import Task
from weightops.training.config import TrainingConfig
from weightops.workflows.patch import Patch
from weightops.workflows.plan import work_of
from weightops.workflows.result import EditResult, confirm

SUPPORTED = ("shapes", "textures", "letters", "words")
"""The tasks that a patch must not harm here: those that it harms most, and easy ones."""


@dataclass(frozen=True)
class ExperimentSettings:
    """The model, task and recipe that an experiment runs on.

    Attributes:
        model: the model to edit.
        task: the name of its task; None for the experiment's own.
        config: the recipe of fine-tuning.
        where: ``device`` and ``precision`` of the session.
        supported: the tasks that a patch must not harm.
    """

    model: Checkpoint
    task: str | None
    config: TrainingConfig
    where: Mapping[str, Any]
    supported: Sequence[Task]

    def session(self, tasks: Iterable[Task]) -> EditSession:
        """Return a session with the model."""
        return EditSession(self.model, tasks, config=self.config, **self.where)

    def patch(
        self, task: Task, also: Sequence[Task] = ()
    ) -> tuple[EditResult, dict[str, Measured]]:
        """Patch a task without writing anything.

        Args:
            task: the task to patch.
            also: further tasks to measure on test data, which have no part in the patch.

        Returns:
            The chosen edit, and model -> test scores.
        """
        workflow = Patch.from_call(task, supported=self.supported, model=self.model, **self.where)
        workflow.may_be_base = True  # an experiment shows that nothing improved, too
        session = self.session(workflow.tasks)
        left(work_of(workflow))
        result = workflow.find(session)
        session.tasks += also
        left((2 + len(result.rivals)) * sum(task.sizes["test"] for task in session.tasks))
        return result, confirm(session, result, workflow.word)


def accuracy(measured: Measured, task: Task) -> float:
    """Return the accuracy on a task."""
    return ACCURACY.of(measured.scores[task.name])
