"""Hold one model in memory, set it to one edit after another, and measure each edit on tasks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from weightops.algebra.linear_form import LinearForm
from weightops.algebra.precision import Precision
from weightops.checkpoints.checkpoint import Checkpoint
from weightops.checkpoints.formats.memory import MemorySource
from weightops.checkpoints.linearized import linearized_at
from weightops.checkpoints.matching import match_names, open_matched
from weightops.checkpoints.opening import CheckpointLike, open_checkpoint, open_ref
from weightops.checkpoints.origin import Origin
from weightops.errors import NonfiniteError
from weightops.evaluation.batchnorm import (
    encoder_with_batchnorm,
    recompute_batchnorm,
    recompute_batchnorm_,
    without_statistics,
)
from weightops.evaluation.linearized import LinearizedModel
from weightops.evaluation.scoring import Order, scoring_for
from weightops.search.goal import Coefficients, Goal, Hits
from weightops.search.measurements import Measurements, image_count
from weightops.support.lazy import torch
from weightops.support.text import file_name
from weightops.task_vector import TaskVector
from weightops.tasks.task import Task
from weightops.training.config import TrainingConfig, config_for
from weightops.training.finetune import finetune

Vectors = Mapping[str, TaskVector]
"""Task vectors by name, in the order of their coefficients."""


@dataclass(frozen=True)
class Measured:
    """The scores of one edit on a split.

    Attributes:
        coefficients: one for each of the edit's vectors.
        scores: task -> metrics; ``n`` among them is the number of samples.
        hits: task -> whether each image was classified correctly, or the log-likelihood of each
            block of text, shape ``(n,)``. The order of samples is the same for all edits.
        guesses: task -> the predicted classes of images, shape ``(n,)``, in the same order.
        fingerprint: of the weights, before batch statistics are recomputed.
    """

    coefficients: Coefficients
    scores: Mapping[str, Mapping[str, Any]]
    hits: Hits
    guesses: Mapping[str, torch.Tensor]
    fingerprint: str

    @property
    def alpha(self) -> float:
        """Return the coefficient of an edit that has one."""
        (alpha,) = self.coefficients
        return alpha


class EditSession:
    """A model in memory, ready to be edited, fine-tuned and measured.

    Args:
        model: the model to edit.
        tasks: the tasks to measure it on.
        config: how to fine-tune; by default `config_for` the model.
        device: "auto", "cpu", "cuda", ...
        batchnorm: a task; averages of weights get batch statistics of its images, see
            `recompute_batchnorm`. With "base", they keep the base's.
        work_folder: where fine-tuning writes its files; without it, vectors stay in memory.
        resume: continue from the files in ``work_folder``.
        on_measured: called with each edit that a search has measured on all validation samples.

    Attributes:
        scoring: how it is measured on the tasks.
        model: the model in memory, as the scoring opens it.
        base: its weights before any edit, in the dtype of the model in memory.
        samples_measured: number of images or blocks of text that the model has been measured on.
        finetuning_seconds: time spent on fine-tuning.
    """

    def __init__(
        self,
        model: CheckpointLike,
        tasks: Iterable[Task],
        *,
        config: TrainingConfig | None = None,
        device: str = "auto",
        precision: Precision = "auto",
        batchnorm: Task | str | None = None,
        work_folder: Path | None = None,
        resume: bool = False,
        on_measured: Callable[[Measured], None] | None = None,
    ) -> None:
        checkpoint, self.tasks = open_checkpoint(model), list(tasks)
        self.scoring = scoring_for(self.tasks)
        self.model = self.scoring.open(checkpoint, device, precision, work_folder)
        if config is not None and config.linearized:
            self._linearize()
            self.model = self.model.in_precision(precision)
        self.dtype = self.scoring.dtype(self.model)
        self.base = self._as_run(self.model.base)
        self.config = config or config_for(checkpoint)
        self.batchnorm = batchnorm
        if batchnorm is not None:
            encoder_with_batchnorm(self.model)
        self.work_folder, self.resume, self.on_measured = work_folder, resume, on_measured
        self.samples_measured = 0
        self.finetuning_seconds = 0.0
        self._orders: dict[tuple[str, int], Order] = {}

    def learn(
        self,
        task: Task,
        *,
        name: str | None = None,
        start: TaskVector | None = None,
        config: TrainingConfig | None = None,
        on_step: Callable[[int], None] | None = None,
    ) -> TaskVector:
        """Fine-tune on a task and return the task vector.

        Args:
            task: the task.
            name: the folder in ``work_folder``; by default named like the task.
            start: an edit to start from; the vector leads from the edited base to the result.
            config: how to fine-tune; by default the session's.
            on_step: called with the number of each step.
        """
        began = time.monotonic()
        origin = start.apply(self.base) if start else self.base
        origin.load_into(self.model.module)
        out = self.work_folder / (name or file_name(task.name)) if self.work_folder else None
        finetuned = finetune(
            replace(self.model, base=origin),
            task,
            config or self.config,
            out=out,
            resume=self.resume,
            on_step=on_step,
        )
        self.base.load_into(self.model.module)
        self.finetuning_seconds += time.monotonic() - began
        # Records name what it is, as its folder is only there while the workflow runs.
        finetuned.source.ref = f"{origin.ref} fine-tuned on {task.name}"
        return TaskVector(origin, self._as_run(finetuned))

    def vector(self, given: CheckpointLike | TaskVector) -> TaskVector:
        """Return a given task vector, or the task vector from the base to given weights.

        ``given`` may also be the path of either. The vector has the base's names.
        """
        if isinstance(given, (str, Path)) and open_ref(given).form.space == "delta":
            given = TaskVector.load(given)
        if isinstance(given, TaskVector):
            named = match_names(Origin.checkpoint_of(given.base, given.form), self.base)
            same = named is given.form
            vector = given if same else TaskVector.of_form(named, given.base)
        else:
            vector = TaskVector(self.base, self._as_run(open_matched(given, self.base)))
        if linearized_at(vector.form) is not None:
            self.base.load_into(self.model.module)
            self._linearize()
        return vector

    def _as_run(self, weights: Checkpoint) -> Checkpoint:
        """Return weights in the dtype of the model in memory."""
        return weights.to(self.dtype) if self.dtype else weights

    def _linearize(self) -> None:
        """Measure the model that is linear in its weights from now on."""
        self.model = LinearizedModel.of(self.model)

    def in_memory(
        self, tensors: Mapping[str, torch.Tensor], ref: str, record: Mapping[str, Any] | None = None
    ) -> TaskVector:
        """Return a task vector of given deltas, which messages call ``ref``, with a record."""
        source = MemorySource(dict(tensors), ref, record=record)
        source.space = "delta"
        if isinstance(self.model, LinearizedModel):
            source.linearized_at = self.model.at.record
        return TaskVector.of_form(LinearForm.of(source), Origin.of(self.base))

    def measure(
        self,
        vector: TaskVector,
        split: str,
        tasks: Iterable[Task] | None = None,
        coefficients: Coefficients = (),
    ) -> Measured:
        """Measure the base edited by a vector, on all samples of a split; of "test", in float32.

        The tasks are the session's unless others are given; ``coefficients`` go into the result.
        """
        self._set(vector)
        tasks = self.tasks if tasks is None else tasks
        outcomes = {task.name: self._outcomes(task, split) for task in tasks}
        return self._judge(vector, outcomes, split, coefficients)

    def edited(self, vector: TaskVector) -> Checkpoint:
        """Return the base edited by a vector, with the batch statistics that `measure` used."""
        vector, task = self._with_batchnorm(vector)
        edited = vector.apply(self.base)
        if task is None:
            return edited
        vector.apply_(self.model.module, base=self.base)
        return recompute_batchnorm(replace(self.model, base=edited), task)

    def trial(self, vectors: Vectors, goal: Goal, tasks: Sequence[Task] | None = None) -> Trial:
        """Return a `Trial` of vectors, on the session's tasks unless others are given."""
        return Trial(self, vectors, goal, self.tasks if tasks is None else tasks)

    def _set(self, vector: TaskVector) -> None:
        """Set the model in memory to the base edited by a vector."""
        vector, task = self._with_batchnorm(vector)
        self.scoring.edit(self.model, vector, self.base)
        if task is not None:
            recompute_batchnorm_(self.model, task)

    def _with_batchnorm(self, vector: TaskVector) -> tuple[TaskVector, Task | None]:
        """Return a vector, without its statistics if an average keeps the base's, and the task for
        an average's new ones.
        """
        if self.batchnorm is None or len(vector.apply(self.base).form.sources) < 2:
            return vector, None
        if isinstance(self.batchnorm, Task):
            return vector, self.batchnorm
        return without_statistics(vector), None

    def model_for(self, split: str) -> Any:
        """Return the model as it is run on a split: on test samples in float32."""
        return self.model.in_precision("float32") if split == "test" else self.model

    def _outcomes(self, task: Task, split: str, only: Order | None = None) -> torch.Tensor:
        """Return the outcome of each sample, and count the samples."""
        outcomes = self.scoring.outcomes(self.model_for(split), task, split, only)
        self.samples_measured += len(outcomes)
        return outcomes

    def _judge(
        self,
        vector: TaskVector,
        outcomes: Mapping[str, torch.Tensor],
        split: str,
        coefficients: Coefficients,
        orders: Mapping[str, Order] | None = None,
    ) -> Measured:
        """Judge outcomes: of all samples, or of the first ones in the orders, if there are any."""
        judged = {}
        for task in self.tasks:
            if task.name in outcomes:
                own = outcomes[task.name]
                order = None if orders is None else orders[task.name][: len(own)]
                judged[task.name] = self.scoring.judge(self.model, task, split, own, order)
        return Measured(
            coefficients,
            {name: one.scores for name, one in judged.items()},
            {name: one.values for name, one in judged.items()},
            {name: one.guesses for name, one in judged.items() if one.guesses is not None},
            vector.apply(self.base).fingerprint,
        )

    def _order(self, task: Task) -> Order:
        """Return a fixed random order of a task's validation samples."""
        size = self.scoring.count(self.model, task, "validation")
        key = (task.name, size)
        if key not in self._orders:
            self._orders[key] = np.random.default_rng(0).permutation(size)
        return self._orders[key]


class Trial:
    """Vectors whose coefficients a search measures on validation samples, as far as needed.

    Attributes:
        session: the session with the model.
        vectors: the vectors by name.
        tasks: the tasks that are measured.
        measurements: the argument of a search, such as `weightops.search.strategies.race`.
    """

    def __init__(
        self, session: EditSession, vectors: Vectors, goal: Goal, tasks: Sequence[Task]
    ) -> None:
        self.session, self.vectors, self.tasks = session, dict(vectors), list(tasks)
        self._seen_outcomes: dict[Coefficients, dict[str, torch.Tensor]] = {}
        sizes = {task.name: len(session._order(task)) for task in self.tasks}
        base, whole = (0.0,) * len(self.vectors), session.scoring.whole
        self.measurements = Measurements(self._measure, goal, base, sizes, whole=whole)

    def vector(self, alpha: Coefficients) -> TaskVector:
        """Return the edit with these coefficients."""
        return weighted_sum(self.vectors, alpha)

    def measured(self, alpha: Coefficients) -> Measured:
        """Return all measurements of an edit."""
        orders = {task.name: self.session._order(task) for task in self.tasks}
        return self.session._judge(
            self.vector(alpha), self._seen_outcomes[alpha], "validation", alpha, orders
        )

    @property
    def sweep(self) -> list[Measured]:
        """Return all measurements of all edits, the base first."""
        by_distance = sorted(self._seen_outcomes, key=lambda alpha: (sum(map(abs, alpha)), alpha))
        return [self.measured(alpha) for alpha in by_distance]

    def _measure(self, alpha: Coefficients, start: float, stop: float) -> Hits:
        """Measure an edit on the samples between two fractions of every task's validation split."""
        try:
            return self._measured_hits(alpha, start, stop)
        except NonfiniteError:
            self._seen_outcomes.pop(alpha, None)  # what has been seen of it isn't told either
            raise

    def _measured_hits(self, alpha: Coefficients, start: float, stop: float) -> Hits:
        session = self.session
        session._set(self.vector(alpha))
        seen, hits = self._seen_outcomes.setdefault(alpha, {}), {}
        for task in self.tasks:
            order = session._order(task)
            samples = order[image_count(len(order), start) : image_count(len(order), stop)]
            if len(samples) == len(order):
                new = session._outcomes(task, "validation")[torch.from_numpy(order)]
            else:
                new = session._outcomes(task, "validation", samples)
            seen[task.name] = torch.cat([seen[task.name], new]) if task.name in seen else new
            hits[task.name] = session.scoring.judge(
                session.model, task, "validation", new, samples
            ).values
        if stop == 1.0 and session.on_measured:
            session.on_measured(self.measured(alpha))
        return hits


def weighted_sum(vectors: Vectors, coefficients: Coefficients) -> TaskVector:
    """Return ``sum_i alpha_i tau_i``."""
    scaled = [vector * a for vector, a in zip(vectors.values(), coefficients, strict=True)]
    return sum(scaled[1:], scaled[0])
