"""TODO."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

from weightops.algebra.linear_form import LinearForm
from weightops.errors import OptionError, TaskError, UnknownNameError
from weightops.merging.methods.source import MethodSource
from weightops.merging.methods.table import METHODS
from weightops.search.goal import Goal
from weightops.search.session import EditSession, Vectors
from weightops.task_vector import TaskVector
from weightops.tasks.table import as_tasks
from weightops.tasks.task import Task
from weightops.workflows.base import EditResult, OnMeasured, Workflow, even, mean_of
from weightops.workflows.negate import TaskLike

Objective = Literal["mean", "normalized", "worst"]


OBJECTIVES: tuple[Objective, ...] = ("normalized", "mean", "worst")


class Addition(Workflow):
    """Several tasks in one model; see `add`."""

    verb = "add"

    def __init__(
        self,
        tasks: Iterable[TaskLike],
        *,
        method: str = "sum",
        each: bool = False,
        objective: Objective = "normalized",
        pairs: bool = False,
        subsets: bool = False,
        method_options: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        self.added = as_tasks(tasks)
        if len(self.added) < 2:
            raise TaskError("an addition needs two tasks at least")
        if objective not in OBJECTIVES:
            raise UnknownNameError(
                f"there is no objective {objective!r}; known: {', '.join(OBJECTIVES)}"
            )
        self.combiner = METHODS["task_arithmetic" if method == "sum" else method]
        self.method_options = self.combiner.check(method_options or {})
        if each and method != "sum":
            raise OptionError(
                f"{method} makes one vector of all: it has one alpha, not one for each task"
            )
        self.each, self.objective, self.pairs, self.subsets = each, objective, pairs, subsets
        self.method = f"The weights are `base + alpha * {method}(finetuned - base, ...)` (task arithmetic, arXiv 2212.04089)"
        super().__init__(dict.fromkeys(self.added, "added"), **options)

    @property
    def learned(self) -> list[Task]:
        return self.added

    @property
    def view(self) -> Goal:
        return Goal(even(self.added), what=mean_of(self.added, "added"))

    def combine(self, bench: EditSession, vectors: Sequence[TaskVector]) -> TaskVector:
        """One vector of several, by the method."""
        source = MethodSource(
            self.combiner,
            [v.form for v in vectors],
            seed=self.config.seed,
            options=self.method_options,
        )
        if self.combiner.fixed:
            return TaskVector._of(source.as_form(), vectors[0].base)
        made = LinearForm.of(source)
        vector = TaskVector._of(made, vectors[0].base)
        return bench.held(dict(vector), source.ref)  # computed once, for all alphas

    def goal(self, tasks: Sequence[Task], experts: Mapping[str, float]) -> Goal:
        """What alpha is chosen for, given the fine-tuned models' validation accuracy."""
        if self.objective == "mean":
            return Goal(even(tasks), what="best mean accuracy")
        scale = {task.name: 1 / max(experts[task.name], 1e-9) for task in tasks}
        if self.objective == "worst":
            return Goal(scale, worst=True, what="best normalized accuracy of the worst task")
        return Goal(
            {name: weight / len(tasks) for name, weight in scale.items()},
            what="best mean normalized accuracy",
        )

    def find(self, bench: EditSession) -> EditResult:
        singles = dict(zip(self.added, self.vectors(bench), strict=True))
        own = {
            task: bench.measure(vector, "validation", [task]) for task, vector in singles.items()
        }
        experts = {task.name: float(m.scores[task.name]["acc1"]) for task, m in own.items()}
        found = self._search(bench, singles, experts)
        found.rivals = {"finetuned": [(vector, [task]) for task, vector in singles.items()]}
        sizes = range(2, len(self.added)) if self.subsets else (2,) if self.pairs else ()
        groups = [
            group
            for size in sizes
            for group in combinations(self.added, size)
            if len(group) < len(self.added)
        ]
        found.more["subsets"] = [
            self._group(bench, {t: singles[t] for t in group}, experts) for group in groups
        ]
        found.more["cosines"] = {
            f"{a.name}, {b.name}": singles[a].cosine(singles[b])
            for a, b in combinations(self.added, 2)
        }
        return found

    def _search(
        self, bench: EditSession, singles: Mapping[Task, TaskVector], experts: Mapping[str, float]
    ) -> EditResult:
        vectors: Vectors
        if self.each:
            vectors = {task.name: vector for task, vector in singles.items()}
        else:
            vectors = {
                "+".join(t.name for t in singles): self.combine(bench, list(singles.values()))
            }
        trial = bench.trial(vectors, self.goal(list(singles), experts), list(singles))
        alpha, why = self.choose(trial)
        return EditResult(vectors, alpha, why, trial.sweep)

    def _group(
        self, bench: EditSession, singles: Mapping[Task, TaskVector], experts: Mapping[str, float]
    ) -> dict[str, Any]:
        """What a subset of the tasks comes to on test data, with a coefficient of its own."""
        found = self._search(bench, singles, experts)
        edited = bench.measure(found.edit, "test", singles)
        alone = {
            t.name: bench.measure(v, "test", [t]).scores[t.name]["acc1"] for t, v in singles.items()
        }
        accuracy = {name: float(edited.scores[name]["acc1"]) for name in alone}
        shares = [_share(accuracy[name], alone[name]) for name in alone]
        return {
            "tasks": list(alone),
            "alpha": found.named,
            "accuracy": accuracy,
            "normalized": math.fsum(shares) / len(shares),
        }

    def conclude(self, tasks: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        shares = {
            name: _share(task[self.word]["acc1"], task["finetuned"]["acc1"])
            for name, task in tasks.items()
        }
        return {
            "normalized": shares,
            "mean": {
                "accuracy": math.fsum(task[self.word]["acc1"] for task in tasks.values())
                / len(tasks),
                "normalized": math.fsum(shares.values()) / len(shares),
            },
        }

    def remarks(self, summary: Mapping[str, Any]) -> list[str]:
        shares = ", ".join(
            f"{name} {100 * share:.1f}" for name, share in summary["normalized"].items()
        )
        groups = [
            f"{' + '.join(g['tasks'])}: normalized {100 * g['normalized']:.1f} % with alpha {g['alpha']}"
            for g in summary["subsets"]
        ]
        return [
            f"normalized accuracy {100 * summary['mean']['normalized']:.1f} % ({shares})",
            *(["\n".join(groups)] if groups else []),
        ]


def add(
    tasks: Iterable[TaskLike],
    out: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    on_measured: OnMeasured = lambda _: None,
    **options: Any,
) -> dict[str, Any]:
    r"""Several tasks in one model: :math:`\theta = \theta_0 + \alpha\sum_i\tau_i` (arXiv 2212.04089), or by any merge method.

    Args:
        tasks: what to add, two at least.
        out: the folder for the edited model and the results; it appears whole.
        resume: go on from where a killed run stopped.
        overwrite: replace ``out``.
        on_measured: called with the validation scores of each candidate.
        options: ``method`` ("sum" or a name in `METHODS`, with ``method_options``), ``each`` (one alpha for each task, by coordinate
            search, instead of a shared one), ``objective`` ("normalized": the mean accuracy relative to each task's fine-tuned
            model's; "mean"; "worst": the lowest normalized accuracy), ``pairs`` and ``subsets`` (do it for every pair or every
            subset, too), and those of `Workflow`.

    Returns:
        The content of ``summary.json``; ``normalized`` is accuracy over the fine-tuned model's, on test data.
    """
    return Addition(tasks, **options).run(
        Path(out), resume=resume, overwrite=overwrite, on_measured=on_measured
    )


def _share(accuracy: float, reference: float) -> float:
    """An accuracy as a share of another; NaN of one that is 0."""
    return accuracy / reference if reference else math.nan
