"""Addition: put several tasks into one model (arXiv 2212.04089)."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any, Literal

from weightops.algebra.linear_form import LinearForm
from weightops.algebra.precision import Precision
from weightops.checkpoints.opening import CheckpointLike
from weightops.errors import OptionError
from weightops.evaluation.batchnorm import BatchNorm
from weightops.merging.methods.source import MethodSource
from weightops.merging.methods.table import METHODS
from weightops.search.descent import Descent, Per, recipe_of
from weightops.search.directions import search_by_gradient
from weightops.search.goal import Goal, accuracy
from weightops.search.session import EditSession, Vectors
from weightops.search.strategies import GRADIENT, SearchOptions
from weightops.support.arguments import check_arguments
from weightops.support.calls import repeatable
from weightops.support.docstrings import describe_arguments_as
from weightops.support.ranges import Range
from weightops.task_vector import TaskVector
from weightops.tasks.table import TaskList, as_tasks
from weightops.tasks.task import Split, Task
from weightops.training.config import TrainingConfig
from weightops.workflows.base import Finetuned, OnMeasured, Workflow, even_weights, mean_name
from weightops.workflows.result import EditResult
from weightops.workflows.run import run

Objective = Literal["normalized", "mean", "worst"]
"""What the coefficients make best on validation data."""


class Addition(Workflow):
    """The workflow of `add`."""

    verb = "add"

    def __init__(
        self,
        tasks: TaskList,
        *,
        method: str,
        method_options: Mapping[str, Any] | None,
        each: bool,
        objective: Objective,
        pairs: bool,
        subsets: bool,
        per: Per,
        search_on: Split,
        search_steps: int,
        search_lr: float,
        **shared: Any,
    ) -> None:
        check_arguments(
            add,
            objective=objective,
            per=per,
            search_on=search_on,
            search_steps=search_steps,
            search_lr=search_lr,
        )
        self.added = as_tasks(tasks)
        if len(self.added) < 2:
            raise OptionError("an addition needs two tasks at least")
        self.combiner = METHODS["task_arithmetic" if method == "sum" else method]
        self.method_options = self.combiner.check(method_options or {})
        if each and method != "sum":
            raise OptionError(
                f"{method} makes one vector of all: it has one alpha, not one for each task"
            )
        self.each, self.objective, self.pairs, self.subsets = each, objective, pairs, subsets
        own = {} if method == "sum" else self.method_options
        self.options = {"method": method, **own, "each": each, "objective": objective}
        self.method = (
            f"The weights are `base + alpha * {method}(finetuned - base, ...)` "
            "(task arithmetic, arXiv 2212.04089)"
        )
        super().__init__(dict.fromkeys(self.added, "added"), **shared)
        given = {"per": per, "on": search_on, "steps": search_steps, "lr": search_lr}
        self.descent: Descent | None = None
        if self.search.strategy not in GRADIENT and given != _defaults():
            raise OptionError(
                f"search {self.search.strategy} follows no gradient, which per=, search_on=, "
                "search_steps= and search_lr= are for",
                hint="search entropy or loss does",
            )
        if self.search.strategy in GRADIENT:
            if self.search.alphas != SearchOptions().alphas:
                raise OptionError(
                    f"search {self.search.strategy} follows a gradient, and tries no alphas",
                    hint="leave out alphas=, or search race, grid or cma",
                )
            if method != "sum" or each:
                raise OptionError(
                    f"search {self.search.strategy} finds coefficients of a sum of vectors",
                    hint="leave out method= and each=",
                )
            self.descent = Descent(self.search.strategy, seed=self.config.seed, **given)  # type: ignore[arg-type]
            own = {"search": self.search.strategy, **given, "objective": objective}
            batchnorm = {k: v for k, v in self.options.items() if k == "batchnorm"}
            self.options = {**own, **batchnorm}

    @property
    def learned(self) -> list[Task]:
        return self.added

    @property
    def view(self) -> Goal:
        what = mean_name(self.added, "added")
        return Goal(even_weights(self.added), what=what, unit=self.unit)

    def goal(self, tasks: Sequence[Task], experts: Mapping[str, float]) -> Goal:
        """Return what the coefficients are chosen for.

        Args:
            tasks: the tasks that are added.
            experts: task -> mean validation value of the model that was fine-tuned on it.
        """
        best, name, own = self.unit.best, self.unit.name, {task.name for task in tasks}
        if self.objective == "mean":
            return Goal(even_weights(tasks), what=f"{best} mean {name}", unit=self.unit)
        scale = self.unit.normalizing({task: v for task, v in experts.items() if task in own})
        if self.objective == "worst":
            what = f"{best} normalized {name} of the worst task"
            return Goal(worst=True, what=what, unit=self.unit, **scale)
        weights = {task: weight / len(tasks) for task, weight in scale.pop("score").items()}
        return Goal(weights, what=f"{best} mean normalized {name}", unit=self.unit, **scale)

    def find(self, session: EditSession) -> EditResult:
        vectors = dict(zip(self.added, self.vectors(session), strict=True))
        experts = {
            task.name: accuracy(session.measure(vector, "validation", [task]).hits[task.name])
            for task, vector in vectors.items()
        }
        result = self._search_alphas(session, vectors, experts)
        result.rivals = {"finetuned": [(vector, [task]) for task, vector in vectors.items()]}
        result.more["subsets"] = [
            self._measure_group(session, {task: vectors[task] for task in group}, experts)
            for group in self._groups()
        ]
        result.more["cosines"] = {
            f"{a.name}, {b.name}": vectors[a].cosine(vectors[b])
            for a, b in combinations(self.added, 2)
        }
        return result

    def _groups(self) -> Iterator[tuple[Task, ...]]:
        """Yield the pairs or subsets that are measured, too."""
        sizes = range(2, len(self.added)) if self.subsets else (2,) if self.pairs else ()
        for size in sizes:
            if size < len(self.added):
                yield from combinations(self.added, size)

    def _combine(self, session: EditSession, vectors: Sequence[TaskVector]) -> TaskVector:
        """Combine several vectors into one by the merge method."""
        forms = [vector.form for vector in vectors]
        source = MethodSource(
            self.combiner, forms, seed=self.config.seed, options=self.method_options
        )
        if self.combiner.fixed:
            return TaskVector.of_form(source.as_form(), vectors[0].base)
        merged = TaskVector.of_form(LinearForm.of(source), vectors[0].base)
        return session.in_memory(dict(merged), source.ref)  # computed once, for all alphas

    def _search_alphas(
        self,
        session: EditSession,
        vectors: Mapping[Task, TaskVector],
        experts: Mapping[str, float],
        *,
        may_be_base: bool = False,
    ) -> EditResult:
        searched: Vectors
        if self.descent is not None:
            return self._descend(self.descent, session, vectors, experts)
        if self.each:
            searched = {task.name: vector for task, vector in vectors.items()}
        else:
            combined = self._combine(session, list(vectors.values()))
            searched = {"+".join(task.name for task in vectors): combined}
        trial = session.trial(searched, self.goal(list(vectors), experts), list(vectors))
        alpha, why = self.choose(trial, may_be_base=may_be_base)
        return EditResult(searched, alpha, why, trial.sweep)

    def _descend(
        self,
        descent: Descent,
        session: EditSession,
        vectors: Mapping[Task, TaskVector],
        experts: Mapping[str, float],
    ) -> EditResult:
        """Find coefficients by gradient, and measure the edit beside the base."""
        named = {task.name: vector for task, vector in vectors.items()}
        searched, found = search_by_gradient(session, named, list(vectors), descent)
        trial = session.trial(searched, self.goal(list(vectors), experts), list(vectors))
        base, alpha = (0.0,) * len(searched), (1.0,) * len(searched)
        for one in (base, alpha):
            trial.measurements.measure(one)
        labels = "without labels" if descent.loss == "entropy" else "with labels"
        images = f"the {descent.on} images, {labels}, of {', '.join(named)}"
        why = f"{descent.steps} steps of Adam on the {descent.loss} of the predictions"
        more = {"chosen_on": images, "transductive": descent.on == "test", **found}
        coefficients = found.get("coefficients", {})
        in_files = all(isinstance(given, (str, Path)) for given in self.finetuned)
        same_names = session.base.specs.keys() <= self.checkpoint.specs.keys()
        if coefficients and self.finetuned and in_files and same_names:  # else of what is written
            files = {t.name: str(f) for t, f in zip(self.added, self.finetuned, strict=True)}
            more["recipe"] = recipe_of(coefficients, files, self.checkpoint.ref)
        return EditResult(searched, alpha, why, trial.sweep, more=more)

    def _measure_group(
        self, session: EditSession, vectors: Mapping[Task, TaskVector], experts: Mapping[str, float]
    ) -> dict[str, Any]:
        """Add a subset of the tasks, with an alpha of its own, and measure it on test data."""
        result = self._search_alphas(session, vectors, experts, may_be_base=True)
        edited = session.measure(result.edit, "test", vectors)
        alone = {
            task.name: session.measure(vector, "test", [task]) for task, vector in vectors.items()
        }
        scores = {name: self.unit.of(edited.scores[name]) for name in alone}
        shares = [
            self.unit.share(scores[name], self.unit.of(own.scores[name]))
            for name, own in alone.items()
        ]
        return {
            "tasks": list(alone),
            "alpha": result.named_alpha,
            self.unit.name: scores,
            "normalized": math.fsum(shares) / len(shares),
        }

    def conclude(self, tasks: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        unit = self.unit
        edited = {name: unit.of(task[self.word]) for name, task in tasks.items()}
        shares = {
            name: unit.share(score, unit.of(tasks[name]["finetuned"]))
            for name, score in edited.items()
        }
        return {
            "normalized": shares,
            "mean": {
                unit.name: unit.mean(list(edited.values())),
                "normalized": math.fsum(shares.values()) / len(shares),
            },
        }

    def remarks(self, summary: Mapping[str, Any]) -> list[str]:
        shares = ", ".join(f"{name} {100 * s:.1f}" for name, s in summary["normalized"].items())
        groups = [
            f"{' + '.join(group['tasks'])}: normalized {100 * group['normalized']:.1f} % "
            f"with alpha {group['alpha']}"
            for group in summary["subsets"]
        ]
        mean = f"normalized {self.unit.name} {100 * summary['mean']['normalized']:.1f} % ({shares})"
        return [mean, "\n".join(groups)] if groups else [mean]


def _defaults() -> dict[str, Any]:
    """Return the options of a search by gradient that hold where none is given."""
    own = inspect.signature(add).parameters
    names = {"per": "per", "on": "search_on", "steps": "search_steps", "lr": "search_lr"}
    return {option: own[name].default for option, name in names.items()}


@repeatable("add")
@describe_arguments_as(Workflow)
def add(
    tasks: TaskList,
    out: str | Path,
    *,
    model: CheckpointLike = "embedded",
    method: str = "sum",
    method_options: Mapping[str, Any] | None = None,
    each: bool = False,
    objective: Objective = "normalized",
    pairs: bool = False,
    subsets: bool = False,
    per: Per = "tensor",
    search_on: Split = "train",
    search_steps: Annotated[int, Range(min=1)] = 200,
    search_lr: Annotated[float, Range(min=0)] = 0.01,
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
    """Put several tasks into one model (task arithmetic, arXiv 2212.04089).

    The weights are ``theta_0 + alpha * sum_i tau_i``, or ``theta_0 + alpha * m(tau_1, tau_2, ...)``
    with a merge method m. Normalized accuracy is accuracy over that of the model which was
    fine-tuned on the task.

    Search entropy finds coefficients on images without labels, by the gradient of the predictions'
    entropy (AdaMerging, arXiv 2310.02575); search loss by that of the loss (as learned soups, arXiv
    2203.05482). The summary has the recipe that `weightops merge` repeats the result from.

    Args:
        tasks: what to add, two tasks at least.
        method: the name of a merge method, or sum.
        method_options: options of the method, such as density=0.2.
        each: search an alpha for each task, instead of a shared one.
        objective: what the coefficients make best on validation data. normalized: the mean
            normalized accuracy; mean: the mean accuracy; worst: the lowest normalized accuracy.
            Of texts, the perplexity of the fine-tuned model over that of the edit is normalized.
        pairs: add every pair of the tasks, too.
        subsets: add every subset of the tasks, too.
        per: for a search by gradient, tensor: a coefficient of each task at each tensor; task: one
            of each task; direction: which singular directions of each task to take, beside a
            coefficient of each task at each tensor (AdaRank, arXiv 2503.22178).
        search_on: the images of a search by gradient: train, validation or test. On test images,
            which the entropy needs no labels of, the result is transductive, and says so.
        search_steps: steps of a search by gradient, with 16 images of each task.
        search_lr: learning rate of a search by gradient.

    Returns:
        The content of ``summary.json``; ``normalized`` is measured on test data.
    """
    workflow = Addition(
        tasks,
        method=method,
        method_options=method_options,
        each=each,
        objective=objective,
        pairs=pairs,
        subsets=subsets,
        per=per,
        search_on=search_on,
        search_steps=search_steps,
        search_lr=search_lr,
        model=model,
        finetuned=finetuned,
        search=search,
        training=training,
        batchnorm=batchnorm,
        device=device,
        precision=precision,
    )
    return run(workflow, out, resume=resume, overwrite=overwrite, on_measured=on_measured)
