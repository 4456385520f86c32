"""Analogy: a model for a task without training data, from three others (arXiv 2212.04089)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from weightops.algebra.precision import Precision
from weightops.checkpoints.opening import CheckpointLike
from weightops.errors import OptionError
from weightops.evaluation.batchnorm import BatchNorm
from weightops.search.goal import Goal
from weightops.search.session import EditSession, Vectors, weighted_sum
from weightops.search.strategies import SearchOptions
from weightops.support.calls import repeatable
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
            raise OptionError(
                "an analogy needs four different tasks: A is to B as C is to the target"
            )
        self.shared, self.supervised = shared, supervised
        self.options = {"shared": shared}
        given = dict.fromkeys([self.a, self.b, self.c], "given")
        super().__init__({self.target: "target", **given}, **common)

    @property
    def to_train(self) -> list[Task]:
        return [*super().to_train, *([self.target] if self.supervised else [])]

    @property
    def candidates(self) -> int:
        return 5 * super().candidates  # the analogy, and four rivals with the same search

    @property
    def searched(self) -> list[Task]:
        return [self.target]

    @property
    def learned(self) -> list[Task]:
        return [self.a, self.b, self.c]

    @property
    def view(self) -> Goal:
        return Goal(even_weights([self.target]), what=self.target.name, unit=self.unit)

    def find(self, session: EditSession) -> EditResult:
        a, b, c = self.vectors(session)
        parts: Vectors = {self.c.name: c, self.b.name: b, f"minus {self.a.name}": -a}
        joined: Vectors = {"analogy": weighted_sum(parts, (1.0, 1.0, 1.0))}
        edit, other = (joined, parts) if self.shared else (parts, joined)
        trial = session.trial(edit, self._goal, [self.target])
        alpha, why = self.choose(trial)
        result = EditResult(edit, alpha, why, trial.sweep)
        compared: dict[str, Vectors] = {
            "only B": {self.b.name: b},
            "only C": {self.c.name: c},
            "C + B": {self.c.name: c, self.b.name: b},
            "one alpha each" if self.shared else "one alpha": other,
        }
        if self.supervised:
            learned = session.learn(self.target, name="supervised")
            compared["finetuned"] = {self.target.name: learned}
        for name, vectors in compared.items():
            self._add_rival(session, result, name, vectors)
        return result

    @property
    def _goal(self) -> Goal:
        what = f"{self.unit.best} {self.target.name} {self.unit.name}"
        return Goal(even_weights([self.target]), what=what, unit=self.unit)

    def _add_rival(
        self, session: EditSession, result: EditResult, name: str, vectors: Vectors
    ) -> None:
        """Add a rival whose coefficients are searched as the analogy's are."""
        trial = session.trial(vectors, self._goal, [self.target])
        alpha, _ = self.choose(trial, may_be_base=True)
        result.rivals[name] = [(trial.vector(alpha), [self.target])]
        result.more.setdefault("rivals", {})[name] = dict(zip(vectors, alpha, strict=True))

    def remarks(self, summary: Mapping[str, Any]) -> list[str]:
        scores = summary["tasks"][self.target.name]
        rivals = (
            f"{name} {self.unit.in_cell(scores[name])} with alpha "
            f"{', '.join(f'{value:g}' for value in alphas.values())}"
            for name, alphas in summary["rivals"].items()
        )
        return [f"searched on the same {self.unit.samples}: {'; '.join(rivals)}"]


@repeatable("analogy")
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
    batchnorm: BatchNorm | None = None,
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
    Its rivals (B alone, C alone, their sum, and the analogy with one alpha instead of one each, or
    the reverse) get the same search on the same images; ``rivals`` of the result has their alphas.

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
        batchnorm=batchnorm,
        device=device,
        precision=precision,
    )
    return run(workflow, out, resume=resume, overwrite=overwrite, on_measured=on_measured)
