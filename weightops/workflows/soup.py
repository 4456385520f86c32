"""Soups: the average of several models, or of those that help (arXiv 2203.05482)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from weightops.algebra.precision import Precision
from weightops.checkpoints.checkpoint import Checkpoint
from weightops.checkpoints.kinds import several
from weightops.checkpoints.opening import CheckpointLike, open_checkpoint
from weightops.errors import OptionError
from weightops.evaluation.batchnorm import BatchNorm
from weightops.search.goal import Coefficients, Goal, weighted
from weightops.search.session import EditSession, Trial, weighted_sum
from weightops.search.strategies import SearchOptions
from weightops.support.arguments import check_arguments
from weightops.support.calls import repeatable
from weightops.support.docstrings import describe_arguments_as
from weightops.tasks.table import SUPPORTED, TaskList, as_tasks
from weightops.tasks.task import Task
from weightops.workflows.base import OnMeasured, Workflow, even_weights, mean_name
from weightops.workflows.result import EditResult
from weightops.workflows.run import run

Selection = Literal["greedy", "uniform"]
"""Which models a soup takes in."""


class Soup(Workflow):
    """The workflow of `soup`."""

    verb, word, keeps_vectors, compared_with = "soup", "soup", False, "best single"
    method = "The weights are an average of models (model soups, arXiv 2203.05482)"

    def __init__(
        self,
        models: Sequence[CheckpointLike],
        *,
        tasks: TaskList | None,
        recipe: Selection,
        base: CheckpointLike | None,
        batchnorm: BatchNorm | None,
        device: str,
        precision: Precision,
    ) -> None:
        check_arguments(soup, recipe=recipe)
        models = several(models, "soup")
        if len(models) < 2:
            raise OptionError("a soup needs two models at least")
        self.models = [open_checkpoint(model) for model in models]
        if base is not None and self.models[0].architecture is None:
            self.models[0] = Checkpoint(self.models[0].form, open_checkpoint(base).architecture)
        self.selection, self.options = recipe, {"recipe": recipe}
        self.base = base
        super().__init__(
            dict.fromkeys(as_tasks(SUPPORTED if tasks is None else tasks), "target"),
            model=self.models[0],
            finetuned=None,
            search=SearchOptions(),
            training=None,
            device=device,
            precision=precision,
            batchnorm=batchnorm,
        )
        self.finetuned = list(self.models)

    @property
    def learned(self) -> list[Task]:
        return []

    @property
    def candidates(self) -> int:
        return 2 * len(self.models)

    @property
    def view(self) -> Goal:
        what = f"{self.unit.name}, {mean_name(self.tasks, 'target')}"
        return Goal(even_weights(self.tasks), what=what, unit=self.unit)

    def find(self, session: EditSession) -> EditResult:
        names = short_names([model.ref for model in self.models])
        opened = [session.vector(model) for model in self.models]
        vectors = dict(zip(names, opened, strict=True))
        trial = session.trial(vectors, self.view)
        tasting = _Tasting(trial, names, self.view)
        if self.selection == "uniform":
            members, why = tasting.take_all()
        else:
            members, why = tasting.take_greedily()
        uniform = weighted_sum(vectors, _shares(range(len(names)), len(names)))
        best = tasting.order[0]
        others = {"best single": opened[best], "uniform": uniform}
        if self.base is not None:
            others = {"base": session.vector(self.base), **others}
        rivals = {name: [(vector, self.tasks)] for name, vector in others.items()}
        more: dict[str, Any] = {
            "recipe": self.selection,
            "best_single": names[best],
            "steps": tasting.steps,
        }
        if self.selection == "uniform":
            more["chosen_on"] = "no data"
        alpha = _shares(members, len(names))
        return EditResult(vectors, alpha, why, trial.sweep, rivals, more)

    def remarks(self, summary: Mapping[str, Any]) -> list[str]:
        lines = [
            f"{'+' if step['accepted'] else '-'} {step['model']} "
            f"({self.unit.cell(step[self.unit.name])}): "
            f"{step['why']}"
            for step in summary["steps"]
        ]
        return ["\n".join(lines)]


class _Tasting:
    """The choice of models for a soup, by mean validation accuracy.

    Attributes:
        order: indices of the models, the best on its own first.
        steps: one record for each model that was looked at.
    """

    def __init__(self, trial: Trial, names: Sequence[str], goal: Goal) -> None:
        self._trial, self._names, self._goal, self._unit = trial, names, goal, goal.unit
        self._alone = [self._score([i]) for i in range(len(names))]
        self.order = sorted(range(len(names)), key=lambda i: -self._alone[i])
        self.steps: list[dict[str, Any]] = []
        self._record(self.order[0], True, "the best on its own")

    def _score(self, members: Sequence[int]) -> float:
        """Return the score of an average of models."""
        shares = _shares(members, len(self._names))
        return weighted(self._trial.measurements.measure(shares), self._goal.score)

    def _record(self, index: int, accepted: bool, why: str) -> None:
        score = {self._unit.name: self._unit.reading(self._alone[index])}
        step = {"model": self._names[index], **score, "accepted": accepted, "why": why}
        self.steps.append(step)

    def take_all(self) -> tuple[Sequence[int], str]:
        """Return all models, and the reason."""
        everyone = range(len(self._names))
        why = (
            f"all {len(everyone)} models, whatever they score "
            f"({self._unit.shown(self._score(everyone))} on "
            f"validation data; the best alone {self._unit.shown(self._alone[self.order[0]])})"
        )
        return everyone, why

    def take_greedily(self) -> tuple[Sequence[int], str]:
        """Return the models with which the score strictly rose, best first, and the reason."""
        members, best = [self.order[0]], self._alone[self.order[0]]
        for i in self.order[1:]:
            score = self._score([*members, i])
            accepted = score > best
            gains = f"{self._unit.gain}s" if accepted else f"does not {self._unit.gain}"
            before, after = map(self._unit.shown, (best, score))
            self._record(i, accepted, f"the soup {gains} with it: {before} to {after}")
            if accepted:
                members, best = [*members, i], score
        why = (
            f"of {len(self._names)} models, best first, {len(members)} "
            f"{'was' if len(members) == 1 else 'were'} kept: the best, and each with which mean "
            f"validation {self._unit.name} strictly {self._unit.gained} "
            f"(to {self._unit.shown(best)})"
        )
        return members, why


def _shares(members: Sequence[int], count: int) -> Coefficients:
    """Return the coefficients of an average of some of ``count`` models."""
    return tuple(1 / len(members) if i in members else 0.0 for i in range(count))


def short_names(refs: Sequence[str]) -> list[str]:
    """Return short names for models, all different."""
    short = [Path(ref).name.removesuffix(".safetensors") or ref for ref in refs]
    return [name if short.count(name) == 1 else f"{name} {i + 1}" for i, name in enumerate(short)]


@repeatable("soup")
@describe_arguments_as(Workflow)
def soup(
    models: Sequence[CheckpointLike],
    out: str | Path,
    *,
    tasks: TaskList | None = None,
    recipe: Selection = "greedy",
    base: CheckpointLike | None = None,
    batchnorm: BatchNorm | None = None,
    device: str = "auto",
    precision: Precision = "auto",
    overwrite: bool = False,
    on_measured: OnMeasured | None = None,
) -> dict[str, Any]:
    """Average models: all of them, or those that help on validation data (arXiv 2203.05482).

    The soup is compared with the model that is best on its own on validation data, and with the
    base if there is one.

    Args:
        models: the models to average, of one architecture.
        tasks: what to measure on. Default: all tasks that weightops draws.
        recipe: greedy: best first, each model is taken in if mean validation accuracy strictly
            rises; uniform: all of them.
        base: the model that these were fine-tuned from, which is measured, too; weights that come
            without a configuration take its.
        batchnorm: the running statistics of each soup. A task: recomputed on its images; base:
            those of the first model.

    Returns:
        The content of ``summary.json``; its ``steps`` say why each model was taken or left.
    """
    workflow = Soup(
        models,
        tasks=tasks,
        recipe=recipe,
        base=base,
        batchnorm=batchnorm,
        device=device,
        precision=precision,
    )
    return run(workflow, out, overwrite=overwrite, on_measured=on_measured)
