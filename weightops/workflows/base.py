"""Edit a model from end to end: learn vectors, choose coefficients, confirm them once, write all.

A `Workflow` says what is particular to one edit: which tasks it learns, how their vectors are
combined, and what coefficients are chosen for. `run` does what all of them share.
"""

from __future__ import annotations

import inspect
import logging
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from typing_extensions import Self

from weightops.algebra.devices import pick_device
from weightops.algebra.precision import Precision, pick_precision
from weightops.checkpoints.linearized import linearized_at
from weightops.checkpoints.opening import CheckpointLike, open_checkpoint
from weightops.errors import NothingSatisfiesError, OptionError
from weightops.evaluation.batchnorm import BASE, BatchNorm, as_batchnorm
from weightops.evaluation.language_model import text_blocks
from weightops.evaluation.units import SCORE, unit_for
from weightops.search.cma_es import evolve
from weightops.search.goal import Choice, Coefficients, Goal, Point, shown
from weightops.search.racing import race
from weightops.search.session import EditSession, Measured, Trial
from weightops.search.strategies import GRADIENT, SearchOptions, coordinates, grid
from weightops.task_vector import TaskVector
from weightops.tasks.table import as_tasks
from weightops.tasks.task import Task
from weightops.tasks.texts import TextTask
from weightops.training.config import TrainingConfig, config_for
from weightops.workflows.result import EditResult

log = logging.getLogger("weightops")

OnMeasured = Callable[[Measured], None]
"""A function that is called with each edit that a search has measured in full."""

Finetuned = CheckpointLike | TaskVector | Sequence[CheckpointLike | TaskVector] | None
"""Fine-tuned weights or task vectors that replace fine-tuning: one, or one for each task."""

_RUN = ("out", "resume", "overwrite", "on_measured")
"""Parameters of a workflow's function that belong to `run`."""


class Workflow(ABC):
    """One edit of a model, from data to a folder with the edited model.

    Each module of this folder has a workflow and the function that runs it, which is called as the
    workflow's ``verb``. The function's signature holds all defaults. These parameters mean the same
    in all of them:

    Args:
        roles: task -> its role, such as "target".
        model: the model to edit: a path to a model with its configuration, or a ref.
        finetuned: weights, or saved task vectors, to use instead of fine-tuning: one for each task
            that is learned, in their order.
        search: the coefficients to try, and how.
        training: the recipe of fine-tuning, see `config_for`; the model's own by default.
        batchnorm: the running statistics of averaged weights. A task: recomputed on its images;
            base: those of the model to edit.
        device: where to compute: auto, cpu, cuda, cuda:1, ...
        precision: what fine-tuning and the search run the model in: float32, bfloat16, or auto:
            bfloat16 where the processor computes in it, else float32. Test accuracies are measured
            in float32.
        resume: resume a run that was killed or interrupted.
        overwrite: replace an output that exists; it stays until the new one is complete.
        on_measured: called with the validation scores of each edit that is measured in full.
        out: the folder for the edited model, ``results.jsonl``, ``summary.json``, ``report.html``
            and pictures; it appears whole, at the end.

    Raises:
        OptionError: if there aren't as many fine-tuned weights as learned tasks.
        TaskError: if two different tasks have one name.
    """

    verb: ClassVar[str]
    """The name of the function, and of the verb on the command line."""
    word: ClassVar[str] = "edited"
    """The name of the edited model in the summary."""
    compared_with: ClassVar[str] = "base"
    """The model of the summary that the edit is compared with."""
    method: str
    """How the weights are computed, for the model card."""
    options: Mapping[str, Any] = {}
    """The edit's own options, which the summary, the card, the page and the weights record."""
    sign: ClassVar[float] = 1.0
    """A factor of all coefficients that are tried."""
    may_be_base: bool = False
    """Whether zeros, the base itself, are an answer, as nothing is written."""
    remedy: ClassVar[str] = "another fine-tuning (steps=, lr=), or other alphas="
    """What may help where no coefficient is an answer."""
    keeps_vectors: ClassVar[bool] = True
    """Whether the vectors are written, too."""

    arguments: Mapping[str, Any]
    """The arguments of the call that the workflow is, by name, for ``run.yaml``."""

    def __new__(cls, *positional: Any, **named: Any) -> Self:
        workflow = super().__new__(cls)
        parameters = list(inspect.signature(cls.__init__).parameters)[1:]
        workflow.arguments = {**dict(zip(parameters, positional, strict=False)), **named}
        return workflow

    def __init__(
        self,
        roles: Mapping[Task, str],
        *,
        model: CheckpointLike,
        finetuned: Finetuned,
        search: SearchOptions,
        training: TrainingConfig | None,
        device: str,
        precision: Precision,
        batchnorm: BatchNorm | None = None,
    ) -> None:
        self.roles = dict(roles)
        self.tasks = as_tasks(self.roles)
        self.unit = unit_for(self.tasks)
        self._blocks: dict[tuple[TextTask, str], int] = {}
        self.checkpoint = open_checkpoint(model)
        self.finetuned = _as_list(finetuned)
        self.search = search
        self.config = training or config_for(self.checkpoint)
        self.device = device
        linear = self.config.linearized or linearized_at(self.checkpoint.form) is not None
        meant = "float32" if linear and precision == "auto" else precision
        self.precision: Any = pick_precision(meant, pick_device(device))
        self.batchnorm = as_batchnorm(batchnorm)
        if self.batchnorm is not None:
            told = self.batchnorm.name if isinstance(self.batchnorm, Task) else self.batchnorm
            self.options = {**self.options, "batchnorm": told}
            of = "the base" if told == BASE else f"the training images of {told}"
            self.method += f", with batch statistics of {of}"
        if self.unit is SCORE and self.learned and not self.finetuned:
            raise OptionError(
                f"{self.tasks[0].name} is scored by a program, and can't be learned from",
                hint="fine-tune by other means, and give finetuned=",
            )
        if self.finetuned and len(self.finetuned) != len(self.learned):
            names = ", ".join(task.name for task in self.learned)
            raise OptionError(
                f"{self.verb} learns {len(self.learned)} tasks ({names}), and "
                f"{len(self.finetuned)} weights or vectors were given",
                hint="give one finetuned= for each task, in this order",
            )

    @classmethod
    def from_call(cls, *arguments: Any, **named: Any) -> Self:
        """Return the workflow that a call of its function would run, with the function's defaults.

        Raises:
            TypeError: for arguments that the function doesn't have.
        """
        signature = inspect.signature(getattr(sys.modules[cls.__module__], cls.verb))
        kept = [p for name, p in signature.parameters.items() if name not in _RUN]
        bound = signature.replace(parameters=kept).bind(*arguments, **named)
        bound.apply_defaults()
        return cls(**bound.arguments)

    # ------------------------------------------- what is particular to an edit

    @property
    def trains(self) -> bool:
        """Whether anything is fine-tuned."""
        return bool(self.to_train)

    @property
    def to_train(self) -> list[Task]:
        """The tasks to fine-tune on, one for each training: those that are learned, where no
        weights were given, and those of baselines.
        """
        return [] if self.finetuned else self.learned

    @property
    @abstractmethod
    def learned(self) -> list[Task]:
        """The tasks to fine-tune on, in the order of ``finetuned``."""

    @abstractmethod
    def find(self, session: EditSession) -> EditResult:
        """Learn the vectors and choose their coefficients, on training and validation data."""

    @property
    @abstractmethod
    def view(self) -> Goal:
        """The axes of the picture: the score upwards, what is kept to the right."""

    @property
    def candidates(self) -> int:
        """About how many edits are measured on validation data."""
        return len(self.search.alphas)

    @property
    def searched(self) -> list[Task]:
        """The tasks that they are measured on."""
        return self.tasks

    def remarks(self, summary: Mapping[str, Any]) -> list[str]:
        """Return further results to print in a terminal."""
        return []

    def conclude(self, tasks: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """Return entries of the summary that follow from the test scores."""
        return {}

    # ----------------------------------------------------------- what all share

    def count(self, task: Task, split: str) -> int:
        """Return the number of samples of a split, without building the model."""
        if not isinstance(task, TextTask):
            return task.sizes[split]
        if (task, split) not in self._blocks:  # to count them is to read the text
            self._blocks[task, split] = len(text_blocks(self.checkpoint, task, split))
        return self._blocks[task, split]

    def size(self, split: str) -> int:
        """Return the number of samples of all tasks in a split."""
        return sum(self.count(task, split) for task in self.tasks)

    def vectors(self, session: EditSession) -> list[TaskVector]:
        """Return a vector for each learned task: the given one, or one that is fine-tuned now."""
        if self.finetuned:
            return [session.vector(given) for given in self.finetuned]
        return [session.learn(task) for task in self.learned]

    def choose(self, trial: Trial, *, may_be_base: bool = False) -> tuple[Coefficients, str]:
        """Search the coefficients of a trial on validation data.

        Args:
            trial: the measurements to choose from.
            may_be_base: accept zeros, the base itself, as nothing is written.

        Returns:
            The coefficients, and the reason for them.

        Raises:
            NothingSatisfiesError: if nothing, or nothing but the base, satisfies the constraint.
        """
        choice = self._search(trial)
        alpha = choice.alpha if isinstance(choice.alpha, tuple) else (choice.alpha,)
        if may_be_base or self.may_be_base or any(alpha):
            return alpha, choice.why
        edits = [point for point in self.points(trial.sweep) if point.distance]
        if not edits:
            raise NothingSatisfiesError("no edit gives finite logits, so there is nothing to write")
        nearest = max(edits, key=lambda point: (point.kept, point.score))
        shown_as = self.unit.shown
        kept = f" at {shown_as(nearest.kept)} {self.view.kept}" if self.view.keep else ""
        names = ", ".join(task.name for task in self.learned)
        measured = trial.measurements
        (base,) = measured.points([measured.base])
        gains = any(point.score > base.score for point in measured.points())
        raise NothingSatisfiesError(
            f"no alpha improves {names} within the rule, so there is nothing to write; the one "
            f"that costs least is alpha {shown(nearest.alpha)}: {shown_as(nearest.score)}{kept}",
            hint=self.remedy if gains else Workflow.remedy,
        )

    def _search(self, trial: Trial) -> Choice:
        """Search by the strategy of the options; several coefficients start from a shared one."""
        if self.search.strategy in GRADIENT:
            raise OptionError(
                f"search {self.search.strategy} is for additions, not for {self.verb}",
                hint="race, grid or cma",
            )
        values = self.signed_alphas
        shared = [(value,) * len(trial.vectors) for value in values]
        if len(trial.vectors) == 1:
            return self.search_line(trial, shared)
        if self.search.strategy == "cma":
            return evolve(trial.measurements, values, shared, seed=self.config.seed)
        return coordinates(trial.measurements, values, shared)

    def search_line(self, trial: Trial, line: Sequence[Coefficients]) -> Choice:
        """Search along a line of coefficients."""
        search = grid if self.search.strategy == "grid" else race
        return search(trial.measurements, line)

    @property
    def signed_alphas(self) -> list[float]:
        """The coefficients to try, with the workflow's sign."""
        return [self.sign * alpha + 0.0 for alpha in self.search.alphas]

    def points(self, sweep: Sequence[Measured]) -> list[Point]:
        """Return the edits that were measured in full, as points of the picture."""
        base = _base_of(sweep) or next((m for m in sweep if not self.view.keep), None)
        full = [m for m in sweep if base and _sizes(m) == _sizes(base)]
        return [self.view.point(m.coefficients, m.hits, base.hits) for m in full if base]

    def estimates(self, sweep: Sequence[Measured]) -> list[Point]:
        """Return the edits that were measured on some of the images only, as points of the picture.

        Each is the base's point, moved by the difference on the images that both were measured on.
        """
        base = _base_of(sweep)
        part = [m for m in sweep if base and _sizes(m) != _sizes(base)]
        return [self._estimate(measured, base) for measured in part if base]

    def _estimate(self, measured: Measured, base: Measured) -> Point:
        view, zero = self.view, base.coefficients
        same = {name: base.hits[name][: len(hits)] for name, hits in measured.hits.items()}
        there, here = (
            view.point(measured.coefficients, measured.hits, same),
            view.point(zero, same, same),
        )
        whole = view.point(zero, base.hits, base.hits)
        low, high = self.unit.range
        score, kept = (
            min(max(getattr(whole, axis) + getattr(there, axis) - getattr(here, axis), low), high)
            for axis in ("score", "kept")
        )
        return replace(there, score=score, kept=kept)


def _base_of(sweep: Sequence[Measured]) -> Measured | None:
    return next((measured for measured in sweep if not any(measured.coefficients)), None)


def _sizes(measured: Measured) -> dict[str, int]:
    return {name: len(hits) for name, hits in measured.hits.items()}


def _as_list(finetuned: Finetuned) -> list[CheckpointLike | TaskVector]:
    if finetuned is None:
        return []
    return list(finetuned) if isinstance(finetuned, (list, tuple)) else [finetuned]  # type: ignore[list-item]


def even_weights(tasks: Iterable[Task], total: float = 1.0) -> dict[str, float]:
    """Return task name -> weight, with equal weights that sum to ``total``."""
    names = [task.name for task in tasks]
    return dict.fromkeys(names, total / len(names)) if names else {}


def mean_name(tasks: Sequence[Task], kind: str) -> str:
    """Return the name of the mean over some tasks, such as "mean of 3 supported tasks"."""
    return tasks[0].name if len(tasks) == 1 else f"mean of {len(tasks)} {kind} tasks"
