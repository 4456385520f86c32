"""TODO."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from weightops.errors import TaskError
from weightops.search.goal import Goal
from weightops.search.session import EditSession, Vectors, combined
from weightops.tasks.table import as_tasks
from weightops.tasks.task import Task
from weightops.workflows.base import EditResult, OnMeasured, Workflow, even
from weightops.workflows.negate import TaskLike


class Analogy(Workflow):
    """A is to B as C is to D: a model for D without training data of it; see `analogy`."""

    verb = "analogy"
    method = "The weights are `base + alpha_C * C + alpha_B * B - alpha_A * A`, vectors each (task analogies, arXiv 2212.04089)"

    def __init__(
        self,
        a: TaskLike,
        b: TaskLike,
        c: TaskLike,
        target: TaskLike,
        *,
        each: bool = True,
        supervised: bool = False,
        **options: Any,
    ) -> None:
        self.a, self.b, self.c, self.d = [as_tasks(name)[0] for name in (a, b, c, target)]
        if len({self.a.name, self.b.name, self.c.name, self.d.name}) < 4:
            raise TaskError(
                "an analogy needs four different tasks: A is to B as C is to the target"
            )
        self.each, self.supervised = each, supervised
        roles = {self.d: "target", **dict.fromkeys([self.a, self.b, self.c], "given")}
        super().__init__(roles, **options)

    @property
    def learned(self) -> list[Task]:
        return [self.a, self.b, self.c]

    @property
    def view(self) -> Goal:
        return Goal(even([self.d]), what=self.d.name)

    def find(self, bench: EditSession) -> EditResult:
        a, b, c = self.vectors(bench)
        names = {f"{self.c.name}": c, f"{self.b.name}": b, f"minus {self.a.name}": -a}
        vectors: Vectors = names if self.each else {"analogy": combined(names, (1.0, 1.0, 1.0))}
        trial = bench.trial(
            vectors, Goal(even([self.d]), what=f"best {self.d.name} accuracy"), [self.d]
        )
        alpha, why = self.choose(trial)
        found = EditResult(vectors, alpha, why, trial.sweep, {})
        for name, vector in (("A", a), ("B", b), ("C", c)):
            found.rivals[f"only {name}"] = [(vector, [self.d])]
        if self.supervised:
            found.rivals["finetuned"] = [(bench.learn(self.d, name="supervised"), [self.d])]
        return found


def analogy(
    a: TaskLike,
    b: TaskLike,
    c: TaskLike,
    target: TaskLike,
    out: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    on_measured: OnMeasured = lambda _: None,
    **options: Any,
) -> dict[str, Any]:
    r"""A model for a task without training data, by analogy: :math:`\tau_D = \tau_C + \tau_B - \tau_A` (arXiv 2212.04089).

    Args:
        a: A, which is to B ...
        b: B ...
        c: as C is ...
        target: to this. Its training images are not used; its validation images choose the coefficients.
        out: the folder for the edited model and the results; it appears whole.
        resume: go on from where a killed run stopped.
        overwrite: replace ``out``.
        on_measured: called with the validation scores of each candidate.
        options: ``each`` (default True: an alpha for each vector, by coordinate search; False: a shared one), ``supervised`` (compare
            with fine-tuning on the target), and those of `Workflow`.

    Returns:
        The content of ``summary.json``.
    """
    workflow = Analogy(a, b, c, target, **options)
    return workflow.run(Path(out), resume=resume, overwrite=overwrite, on_measured=on_measured)
