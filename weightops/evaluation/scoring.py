"""Scorings: how a model is opened for a kind of task, and measured on its samples.

A search and a workflow are the same for all kinds. They ask a `Scoring` for the outcome of each
sample, and for what outcomes are worth.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from weightops.algebra.devices import pick_device
from weightops.algebra.precision import Precision
from weightops.checkpoints.checkpoint import Checkpoint
from weightops.checkpoints.opening import CheckpointLike
from weightops.errors import TaskError
from weightops.evaluation.image_model import ImageModel
from weightops.evaluation.language_model import LanguageModel, text_metrics
from weightops.evaluation.pixels import prepare_all
from weightops.evaluation.programs import Candidate
from weightops.evaluation.units import ACCURACY, PERPLEXITY, SCORE, Unit, unit_for
from weightops.evaluation.zero_shot import metrics, predict, record
from weightops.support.lazy import torch
from weightops.task_vector import TaskVector
from weightops.tasks.task import Task

Order = npt.NDArray[np.int64]
"""Indices of samples."""


@dataclass(frozen=True)
class Judged:
    """The worth of the outcomes of samples.

    Attributes:
        scores: metrics by name; ``n`` among them is the number of samples.
        values: a value for each sample, the higher the better, shape ``(n,)``.
        guesses: the predicted classes, shape ``(n,)``; None if the samples have none.
    """

    scores: Mapping[str, Any]
    values: torch.Tensor
    guesses: torch.Tensor | None = None


class Scoring(ABC):
    """A way to measure models on one kind of task.

    Attributes:
        unit: the unit of the score.
        whole: all samples are measured at once, or none.
    """

    unit: Unit
    whole: bool = False

    @abstractmethod
    def open(
        self, model: CheckpointLike, device: str, precision: Precision, folder: Path | None = None
    ) -> Any:
        """Return a model that is ready to be measured.

        Args:
            model: the model.
            device: where to compute.
            precision: what to run it in.
            folder: where measurements may be kept for a run that is resumed.
        """

    def dtype(self, model: Any) -> torch.dtype | None:
        """Return the dtype of the weights in memory; None for those of the files."""
        own: torch.dtype = next(model.module.parameters()).dtype
        return own

    def edit(self, model: Any, vector: TaskVector, base: Checkpoint) -> None:
        """Set a model to the base edited by a vector."""
        vector.apply_(model.module, base=base)

    @abstractmethod
    def count(self, model: Any, task: Task, split: str) -> int:
        """Return the number of samples of a split."""

    @abstractmethod
    def prepare(self, model: Any, splits: Iterable[tuple[Task, str]]) -> None:
        """Read the samples of splits, and refuse what can't be read."""

    @abstractmethod
    def outcomes(
        self, model: Any, task: Task, split: str, only: Order | None = None
    ) -> torch.Tensor:
        """Return the outcome of each sample, shape ``(n, ...)``.

        Args:
            model: the model.
            task: the task.
            split: "test", "validation" or "train".
            only: indices of the samples; all by default.

        Raises:
            NonfiniteError: if logits are NaN or infinite.
        """

    @abstractmethod
    def judge(
        self, model: Any, task: Task, split: str, outcomes: torch.Tensor, order: Order | None = None
    ) -> Judged:
        """Return what outcomes are worth, of all samples or of those in ``order``."""

    @abstractmethod
    def record(
        self, model: Any, task: Task, split: str, scores: Mapping[str, Any], fingerprint: str
    ) -> dict[str, Any]:
        """Return a line of a file of results."""


class _Images(Scoring):
    """Accuracy on images; an outcome is the five likeliest classes."""

    unit = ACCURACY

    def open(
        self, model: CheckpointLike, device: str, precision: Precision, folder: Path | None = None
    ) -> ImageModel:
        return ImageModel.open(model, device, precision=precision)

    def count(self, model: ImageModel, task: Task, split: str) -> int:
        return len(model.pixels(task, split))

    def prepare(self, model: ImageModel, splits: Iterable[tuple[Task, str]]) -> None:
        for task, split in splits:
            if not self.count(model, task, split):
                raise TaskError(f"{task.name} has no images for {split}")
        prepare_all([model.pixels(task, split) for task, split in splits])

    def outcomes(
        self, model: ImageModel, task: Task, split: str, only: Order | None = None
    ) -> torch.Tensor:
        return predict(model, task, split, only=only)

    def judge(
        self,
        model: ImageModel,
        task: Task,
        split: str,
        outcomes: torch.Tensor,
        order: Order | None = None,
    ) -> Judged:
        labels = model.pixels(task, split).labels
        labels = labels if order is None else labels[order]
        scores = metrics(outcomes, labels, len(task.classes))
        return Judged(scores, outcomes[:, 0] == labels, outcomes[:, 0])

    def record(
        self, model: ImageModel, task: Task, split: str, scores: Mapping[str, Any], fingerprint: str
    ) -> dict[str, Any]:
        return record(model, task, split, scores, fingerprint)


class _Texts(Scoring):
    """Perplexity of texts; an outcome is the log-likelihood of a block."""

    unit = PERPLEXITY

    def open(
        self, model: CheckpointLike, device: str, precision: Precision, folder: Path | None = None
    ) -> LanguageModel:
        return LanguageModel.open(model, device, precision=precision)

    def count(self, model: LanguageModel, task: Any, split: str) -> int:
        return len(model.blocks(task, split))

    def prepare(self, model: LanguageModel, splits: Iterable[tuple[Any, str]]) -> None:
        for task, split in splits:
            model.blocks(task, split)

    def outcomes(
        self, model: LanguageModel, task: Any, split: str, only: Order | None = None
    ) -> torch.Tensor:
        return model.log_likelihoods(task, split, only=only)

    def judge(
        self,
        model: LanguageModel,
        task: Any,
        split: str,
        outcomes: torch.Tensor,
        order: Order | None = None,
    ) -> Judged:
        return Judged(text_metrics(outcomes, model.blocks(task, split).shape[1]), outcomes)

    def record(
        self, model: LanguageModel, task: Any, split: str, scores: Any, fingerprint: str
    ) -> dict[str, Any]:
        return model.record(task, split, scores, fingerprint)


class _Programs(Scoring):
    """Scores of programs; an outcome is the score of an item."""

    unit, whole = SCORE, True

    def open(
        self, model: CheckpointLike, device: str, precision: Precision, folder: Path | None = None
    ) -> Candidate:
        return Candidate.open(model, pick_device(device), folder)

    def dtype(self, model: Candidate) -> None:
        return None

    def edit(self, model: Candidate, vector: TaskVector, base: Checkpoint) -> None:
        model.edited = vector.apply(base)

    def count(self, model: Candidate, task: Any, split: str) -> int:
        return len(model.values(task, split))

    def prepare(self, model: Candidate, splits: Iterable[tuple[Any, str]]) -> None:
        for task, split in splits:
            model.values(task, split)

    def outcomes(
        self, model: Candidate, task: Any, split: str, only: Order | None = None
    ) -> torch.Tensor:
        values = model.values(task, split)
        return values if only is None else values[torch.from_numpy(only)]

    def judge(
        self,
        model: Candidate,
        task: Any,
        split: str,
        outcomes: torch.Tensor,
        order: Order | None = None,
    ) -> Judged:
        scores = {SCORE.metric: outcomes.mean().item(), "n": len(outcomes)}
        return Judged(scores, outcomes)

    def record(
        self, model: Candidate, task: Any, split: str, scores: Mapping[str, Any], fingerprint: str
    ) -> dict[str, Any]:
        return model.record(task, split, scores, fingerprint)


IMAGES: Scoring = _Images()
TEXTS: Scoring = _Texts()
PROGRAMS: Scoring = _Programs()


def scoring_for(tasks: Sequence[Task]) -> Scoring:
    """Return the scoring of tasks that are measured together.

    Raises:
        OptionError: if they are of several kinds.
    """
    unit = unit_for(tasks)
    return next(scoring for scoring in (IMAGES, TEXTS, PROGRAMS) if scoring.unit is unit)
