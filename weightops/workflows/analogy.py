"""Analogy: a model for a task without training data, from three others (arXiv 2212.04089)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from weightops.algebra.precision import Precision
from weightops.checkpoints.opening import CheckpointLike
from weightops.errors import TaskError
from weightops.search.goal import Goal
from weightops.search.session import EditSession, Vectors, weighted_sum
from weightops.search.strategies import SearchOptions
from weightops.support.docstrings import describe_arguments_as
from weightops.tasks.table import TaskLike, as_task
from weightops.tasks.task import Task
from weightops.training.config import TrainingConfig
from weightops.workflows.base import Finetuned, OnMeasured, Workflow, even_weights
from weightops.workflows.result import EditResult
from weightops.workflows.run import run


class Analogy(Workflow):
    """The workflow of `analogy`."""

    verb = "analogy"
    method = (
        "The weights are `base + alpha_C * C + alpha_B * B - alpha_A * A`, vectors each "
        "(task analogies, arXiv 2212.04089)"
    )

    def __init__(
        self,
        a: TaskLike,
        b: TaskLike,
        c: TaskLike,
        target: TaskLike,
        *,
        shared: bool,
        supervised: bool,
        **common: Any,
    ) -> None:
        self.a, self.b, self.c, self.target = map(as_task, (a, b, c, target))
        if len({task.name for task in (self.a, self.b, self.c, self.target)}) < 4:
            raise TaskError(
                "an analogy needs four different tasks: A is to B as C is to the target"
            )
        self.shared, self.supervised = shared, supervised
        self.options = {"shared": shared}
        given = dict.fromkeys([self.a, self.b, self.c], "given")
        super().__init__({self.target: "target", **given}, **common)

    @property
    def learned(self) -> list[Task]:
        return [self.a, self.b, self.c]

    @property
    def view(self) -> Goal:
        return Goal(even_weights([self.target]), what=self.target.name)

    def find(self, session: EditSession) -> EditResult:
        a, b, c = self.vectors(session)
        vectors: Vectors = {self.c.name: c, self.b.name: b, f"minus {self.a.name}": -a}
        if self.shared:
            vectors = {"analogy": weighted_sum(vectors, (1.0, 1.0, 1.0))}
        goal = Goal(even_weights([self.target]), what=f"best {self.target.name} accuracy")
        trial = session.trial(vectors, goal, [self.target])
        alpha, why = self.choose(trial)
        rivals = {
            f"only {name}": [(vector, [self.target])]
            for name, vector in (("A", a), ("B", b), ("C", c))
        }
        if self.supervised:
            learned = session.learn(self.target, name="supervised")
            rivals["finetuned"] = [(learned, [self.target])]
        return EditResult(vectors, alpha, why, trial.sweep, rivals)


@describe_arguments_as(Workflow)
def analogy(
    a: TaskLike,
    b: TaskLike,
    c: TaskLike,
    target: TaskLike,
    out: str | Path,
    *,
    model: CheckpointLike = "embedded",
    shared: bool = False,
    supervised: bool = False,
    finetuned: Finetuned = None,
    search: SearchOptions = SearchOptions(),  # noqa: B008  (it is immutable)
    training: TrainingConfig | None = None,
    device: str = "auto",
    precision: Precision = "auto",
    resume: bool = False,
    overwrite: bool = False,
    on_measured: OnMeasured | None = None,
) -> dict[str, Any]:
    """Make a model for a task without training data: C + B - A (arXiv 2212.04089).

    A is to B as C is to the target, so the target's vector is ``tau_C + tau_B - tau_A``. The
    built-in example has letters of two halves of the alphabet in two styles: trained on both
    styles of the first half and on one of the second, it reads the other style of the second half.

    Args:
        a: A is to B ...
        b: ... as ...
        c: ... C is to the target.
        target: the task without training data; its validation images choose the coefficients.
        shared: search one alpha for all three vectors, instead of one each.
        supervised: compare with fine-tuning on the target.

    Returns:
        The content of ``summary.json``.
    """
    workflow = Analogy(
        a,
        b,
        c,
        target,
        shared=shared,
        supervised=supervised,
        model=model,
        finetuned=finetuned,
        search=search,
        training=training,
        device=device,
        precision=precision,
    )
    return run(workflow, out, resume=resume, overwrite=overwrite, on_measured=on_measured)
