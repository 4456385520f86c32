"""A bench: the resident model, set to one edit after another, and measured on tasks; every pass is counted."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from weightops.algebra.linear_form import LinearForm
from weightops.checkpoints.checkpoint import Checkpoint
from weightops.checkpoints.formats.memory import MemorySource
from weightops.checkpoints.matching import open_like
from weightops.checkpoints.opening import CheckpointLike, open_checkpoint, open_ref
from weightops.evaluation.batchnorm import normalised, recompute_batchnorm, recompute_batchnorm_
from weightops.evaluation.image_model import ImageModel
from weightops.evaluation.zero_shot import metrics, predict
from weightops.search.goal import Coefficients, Goal, Hits
from weightops.search.strategies import Measurements, cut
from weightops.task_vector import Origin, TaskVector
from weightops.tasks.task import Task
from weightops.training.config import TrainingConfig, config_for
from weightops.training.finetune import finetune

Vectors = Mapping[str, TaskVector]
"""Task vectors by name, in the order of their coefficients."""


@dataclass(frozen=True)
class Measured:
    """What one edit scores on a split: every task's metrics, which images were named rightly, and the weights' fingerprint.

    Attributes:
        coefficients: of the edit's vectors.
        scores: task -> metrics; their ``n`` tells on how many images.
        hits: task -> boolean tensor of shape ``(n,)``, in one order for all edits.
        guesses: task -> the classes named, in the same order.
        fingerprint: of the weights, before batch statistics are made anew.
    """

    coefficients: Coefficients
    scores: Mapping[str, Mapping[str, Any]]
    hits: Hits
    guesses: Mapping[str, torch.Tensor]
    fingerprint: str

    @property
    def alpha(self) -> float:
        """The coefficient, where there is one."""
        [alpha] = self.coefficients
        return alpha


class EditSession:
    """A model ready to be edited, fine-tuned and measured.

    Args:
        model: what is edited.
        tasks: what it is measured on.
        config: how it is fine-tuned; by default `config_for` the model.
        device: "auto", "cpu", "cuda", ...
        batchnorm: a task on whose images averages of weights get batch statistics of their own, see `recompute_batchnorm`.
        work: a folder for what fine-tuning leaves; without it, vectors stay in memory.
        resume: go on from what is in ``work``.
        on_measured: called with each edit that a search measured on all validation images.

    Attributes:
        passes: images that have been run through the model to measure it.
        seconds: spent on fine-tuning.
    """

    def __init__(
        self,
        model: CheckpointLike,
        tasks: Iterable[Task],
        *,
        config: TrainingConfig | None = None,
        device: str = "auto",
        batchnorm: Task | None = None,
        work: Path | None = None,
        resume: bool = False,
        on_measured: Callable[[Measured], None] = lambda _: None,
    ) -> None:
        checkpoint = open_checkpoint(model)
        self.clip = ImageModel.open(checkpoint, device)
        self.dtype: torch.dtype = next(self.clip.module.parameters()).dtype
        self.base = self.clip.base.to(self.dtype)
        self.tasks = list(tasks)
        self.config = config or config_for(checkpoint)
        self.batchnorm = batchnorm
        if batchnorm is not None:
            normalised(self.clip)
        self.work, self.resume, self.on_measured = work, resume, on_measured
        self.passes = 0
        self.seconds = 0.0
        self._orders: dict[tuple[str, int], npt.NDArray[np.int64]] = {}

    # ------------------------------------------------------------ vectors

    def learn(
        self,
        task: Task,
        *,
        name: str | None = None,
        start: TaskVector | None = None,
        config: TrainingConfig | None = None,
        on_step: Callable[[int], None] | None = None,
    ) -> TaskVector:
        """Fine-tune on a task: the vector from where it started, which is the base, or the base edited by ``start``."""
        began = time.monotonic()
        origin = start.apply(self.base) if start else self.base
        origin.load_into(self.clip.module)
        folder = self.work / (name or file_name(task.name)) if self.work else None
        tuned = finetune(
            replace(self.clip, base=origin),
            task,
            config or self.config,
            out=folder,
            resume=self.resume,
            on_step=on_step,
        )
        self.base.load_into(self.clip.module)
        self.seconds += time.monotonic() - began
        return TaskVector(origin, tuned.to(self.dtype))

    def vector(self, given: CheckpointLike | TaskVector) -> TaskVector:
        """The vector from the base to given weights, or a given vector: an object, or the path of either."""
        if isinstance(given, TaskVector):
            return given
        if isinstance(given, (str, Path)) and open_ref(given).form.space == "delta":
            return TaskVector.load(given)
        return TaskVector(self.base, open_like(given, self.base).to(self.dtype))

    def held(self, tensors: Mapping[str, torch.Tensor], ref: str) -> TaskVector:
        """A vector whose deltas are in memory: for one that is dear to compute, or made from nothing else."""
        source = MemorySource({name: tensors[name] for name in tensors}, ref)
        source.space = "delta"
        return TaskVector._of(LinearForm.of(source), Origin.of(self.base))

    # ------------------------------------------------------------ measure

    def measure(
        self,
        vector: TaskVector,
        split: str,
        tasks: Iterable[Task] | None = None,
        coefficients: Coefficients = (),
    ) -> Measured:
        """The base edited by a vector, on whole splits."""
        self._set(vector)
        guesses = {
            task.name: self._predict(task, split)
            for task in (self.tasks if tasks is None else tasks)
        }
        return self._measured(
            vector, guesses, {name: None for name in guesses}, split, coefficients
        )

    def edited(self, vector: TaskVector) -> Checkpoint:
        """The base edited by a vector, as it is measured."""
        edited, statistics = vector.apply(self.base), self._statistics(vector)
        if statistics is None:
            return edited
        vector.apply_(self.clip.module, base=self.base)
        return recompute_batchnorm(replace(self.clip, base=edited), statistics)

    def _set(self, vector: TaskVector) -> None:
        vector.apply_(self.clip.module, base=self.base)
        statistics = self._statistics(vector)
        if statistics is not None:
            recompute_batchnorm_(self.clip, statistics)

    def _statistics(self, vector: TaskVector) -> Task | None:
        """What the edited base's batch statistics are made anew on, if they are: not where it is one of the models as it is."""
        return (
            self.batchnorm
            if self.batchnorm and len(vector.apply(self.base).form.sources) > 1
            else None
        )

    def _predict(
        self, task: Task, split: str, only: npt.NDArray[np.int64] | None = None
    ) -> torch.Tensor:
        guesses = predict(self.clip, task, split, only=only)
        self.passes += len(guesses)
        return guesses

    def _measured(
        self,
        vector: TaskVector,
        guesses: Mapping[str, torch.Tensor],
        orders: Mapping[str, npt.NDArray[np.int64] | None],
        split: str,
        coefficients: Coefficients,
    ) -> Measured:
        scores, hits = {}, {}
        for task in self.tasks:
            if task.name in guesses:
                labels = self.clip.pixels(task, split).labels
                order = orders[task.name]
                seen = labels if order is None else labels[order[: len(guesses[task.name])]]
                scores[task.name] = metrics(guesses[task.name], seen, len(task.classes))
                hits[task.name] = guesses[task.name][:, 0] == seen
        first = {name: g[:, 0] for name, g in guesses.items()}
        return Measured(coefficients, scores, hits, first, vector.apply(self.base).fingerprint)

    def _order(self, task: Task) -> npt.NDArray[np.int64]:
        """A fixed order of a task's validation images in which any first few are a fair sample."""
        size = len(self.clip.pixels(task, "validation"))
        key = (task.name, size)
        if key not in self._orders:
            self._orders[key] = np.random.default_rng(0).permutation(size)
        return self._orders[key]

    def trial(self, vectors: Vectors, goal: Goal, tasks: Sequence[Task] | None = None) -> Trial:
        """What a search over the coefficients of vectors works on."""
        return Trial(self, vectors, goal, self.tasks if tasks is None else tasks)


class Trial:
    """The coefficients of some vectors, measured on validation data as far as a search asks for it.

    Attributes:
        sheet: for `weightops.search`.
    """

    def __init__(
        self, bench: EditSession, vectors: Vectors, goal: Goal, tasks: Sequence[Task]
    ) -> None:
        self.bench, self.vectors, self.tasks = bench, dict(vectors), list(tasks)
        self._guesses: dict[Coefficients, dict[str, torch.Tensor]] = {}
        sizes = {task.name: len(bench.clip.pixels(task, "validation")) for task in self.tasks}
        self.sheet = Measurements(self._measure, goal, (0.0,) * len(self.vectors), sizes)

    def vector(self, alpha: Coefficients) -> TaskVector:
        """The edit that coefficients stand for."""
        return combined(self.vectors, alpha)

    def _measure(self, alpha: Coefficients, start: float, stop: float) -> Hits:
        bench = self.bench
        bench._set(self.vector(alpha))
        kept, hits = self._guesses.setdefault(alpha, {}), {}
        for task in self.tasks:
            order = bench._order(task)
            first, last = cut(len(order), start), cut(len(order), stop)
            if (first, last) == (0, len(order)):
                new = bench._predict(task, "validation")[torch.from_numpy(order)]
            else:
                new = bench._predict(task, "validation", order[first:last])
            kept[task.name] = torch.cat([kept[task.name], new]) if task.name in kept else new
            labels = bench.clip.pixels(task, "validation").labels[order[first:last]]
            hits[task.name] = new[:, 0] == labels
        if stop == 1.0:
            bench.on_measured(self.measured(alpha))
        return hits

    def measured(self, alpha: Coefficients) -> Measured:
        """Everything that was measured of some coefficients."""
        orders = {task.name: self.bench._order(task) for task in self.tasks}
        return self.bench._measured(
            self.vector(alpha), self._guesses[alpha], orders, "validation", alpha
        )

    @property
    def sweep(self) -> list[Measured]:
        """Everything that was measured, the base first."""
        return [
            self.measured(alpha)
            for alpha in sorted(self._guesses, key=lambda a: (sum(map(abs, a)), a))
        ]


def combined(vectors: Vectors, alpha: Coefficients) -> TaskVector:
    """The weighted sum of vectors."""
    scaled = [vector * a for vector, a in zip(vectors.values(), alpha, strict=True)]
    return sum(scaled[1:], scaled[0])


def file_name(name: str) -> str:
    """A task's name where it becomes a file's."""
    return name.replace(":", "-")
