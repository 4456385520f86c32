"""Rank task vectors by how much each can be expected to help a task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from weightops.algebra.precision import Precision
from weightops.checkpoints.kinds import several
from weightops.checkpoints.opening import CheckpointLike, open_checkpoint
from weightops.errors import OptionError
from weightops.evaluation.scoring import IMAGES, PROGRAMS
from weightops.evaluation.zero_shot import predict
from weightops.reports.frontier import COLORS, INK
from weightops.reports.outcome import Outcome
from weightops.search.goal import Goal
from weightops.search.racing import race
from weightops.search.session import EditSession
from weightops.search.strategies import ALPHAS
from weightops.support.arguments import check_arguments
from weightops.support.atomic import reserved
from weightops.support.calls import repeatable
from weightops.support.lazy import torch
from weightops.support.progress import job
from weightops.support.ranges import Range
from weightops.task_vector import TaskVector
from weightops.tasks.table import TaskLike, as_task
from weightops.tasks.task import Images, ImageSubset, Task
from weightops.training.config import config_for
from weightops.training.training_loop import step_work
from weightops.workflows.base import even_weights
from weightops.workflows.soup import short_names

_LOOKS_FOR_TRUTH = 5
"""About how often a search looks at all validation images, and then at the test images."""

PROBE_ALPHA = 0.3
"""The alpha at which a vector's gain on validation data is measured."""


@repeatable("rank")
def rank(
    vectors: Mapping[str, CheckpointLike | TaskVector] | Sequence[str | Path],
    target: TaskLike,
    out: str | Path | None = None,
    *,
    model: CheckpointLike = "embedded",
    labels: Annotated[int, Range(min=0)] | None = None,
    steps: Annotated[int, Range(min=1)] = 20,
    truth: bool = False,
    device: str = "auto",
    precision: Precision = "auto",
    seed: Annotated[int, Range(min=0)] = 0,
    overwrite: bool = False,
) -> Outcome:
    """Rank task vectors (or fine-tuned weights) by how much they can be expected to help a task.

    A vector is ranked by what a small step along it (alpha 0.3) gains on validation data; where no
    labels may be used, by its cosine with the vector of a few steps of fine-tuning on the target. A
    task that a program scores has gains only.

    Args:
        vectors: name -> vector, fine-tuned weights, or the path of either; or only paths.
        target: the task to be helped.
        out: a folder for table, picture and results.
        model: the model that the vectors belong to.
        labels: how many labelled images of the target to use for each criterion. Default: all. With
            0, the model's own guesses replace the labels for the cosine, and no gain is measured.
        steps: steps of the fine-tuning that the cosine is taken with.
        truth: measure what each vector really gives on test data, with the alpha that is best on
            all validation data, and how well the order agrees (Spearman's rank correlation).
        device: where to compute: auto, cpu, cuda, cuda:1, ...
        precision: what the model is run in, but for test data: float32, bfloat16, or auto: bfloat16
            where the processor computes in it, else float32.
        seed: seed of the fine-tuning.
        overwrite: replace an output that exists; it stays until the new one is complete.

    Raises:
        OptionError: if there are no vectors.
    """
    check_arguments(rank, steps=steps, seed=seed)
    if isinstance(vectors, (str, Path)):
        several(vectors, "rank")
    if not vectors:
        raise OptionError("there are no vectors to rank")
    if not isinstance(vectors, Mapping):
        names = short_names([str(path) for path in vectors])
        vectors = dict(zip(names, vectors, strict=True))
    task = as_task(target)
    with reserved(out, overwrite=overwrite) if out is not None else nullcontext():
        config = config_for(open_checkpoint(model), steps=steps, seed=seed)
        session = EditSession(model, [task], config=config, device=device, precision=precision)
        if session.scoring not in (IMAGES, PROGRAMS):
            raise OptionError(f"{task.name} is a text, and vectors are ranked for images")
        if session.scoring is PROGRAMS and labels is not None:
            raise OptionError(f"{task.name} is scored by a program, which has no labels to count")
        looks = 2 + (_LOOKS_FOR_TRUTH if truth else 0)
        by_program = session.scoring is PROGRAMS
        training = 0 if by_program else steps * step_work(config)
        samples = 1 if by_program else task.sizes["validation"]
        with job("ranking", training + looks * len(vectors) * samples):
            criteria = _measure(session, task, vectors, labels)
            outcome = _outcome(session, task, criteria, labels=labels, steps=steps, truth=truth)
        if out is not None:
            about = {"model": session.base.ref, "precision": session.model.precision}
            outcome.write(Path(out), about, overwrite=overwrite)
    return outcome


@dataclass(frozen=True)
class _Criteria:
    """The two criteria of each vector, and the order that follows.

    Attributes:
        vectors: name -> vector.
        cosines: name -> cosine with a few steps on the target; empty for a program's task.
        gains: name -> gain on validation data; empty without labels.
    """

    vectors: Mapping[str, TaskVector]
    cosines: Mapping[str, float]
    gains: Mapping[str, float]

    @property
    def order(self) -> list[str]:
        """The names, the most promising first."""
        return sorted(
            self.vectors,
            key=lambda name: (-self.gains.get(name, 0.0), -self.cosines.get(name, 0.0)),
        )


def _measure(
    session: EditSession,
    task: Task,
    given: Mapping[str, CheckpointLike | TaskVector],
    labels: int | None,
) -> _Criteria:
    """Measure both criteria of all vectors."""
    vectors = {name: session.vector(vector) for name, vector in given.items()}
    share = 1.0 if labels is None else min(1.0, labels / task.sizes["validation"])
    cosines = {}
    if session.scoring is IMAGES:
        direction = session.learn(_with_few_labels(session, task, labels))
        cosines = {name: vector.cosine(direction) for name, vector in vectors.items()}
    gains = {}
    for name, vector in vectors.items() if share else ():
        measurements = session.trial({name: vector}, Goal(even_weights([task]))).measurements
        hits = measurements.measure((PROBE_ALPHA,), share)
        base = measurements.measure((0.0,), share)
        gains[name] = measurements.goal.gain(hits, base)[0]
    return _Criteria(vectors, cosines, gains)


def _with_few_labels(session: EditSession, task: Task, labels: int | None) -> Task:
    """Return the task with so many training images; with 0, labelled by the model's guesses."""
    if labels is None:
        return task
    if labels == 0:
        guesses = predict(session.model, task, "train")[:, 0].numpy()
        order = np.arange(len(guesses))
    else:
        order = np.random.default_rng(0).permutation(task.sizes["train"])[:labels]

    def load(split: str) -> Images:
        images = task.load(split)
        if split != "train":
            return images
        return ImageSubset(images, order, guesses if labels == 0 else images.labels[order])

    return replace(task, load=load)


def _outcome(
    session: EditSession,
    task: Task,
    criteria: _Criteria,
    *,
    labels: int | None,
    steps: int,
    truth: bool,
) -> Outcome:
    """Build the table, the picture and the title."""
    order, cosines, gains = criteria.order, criteria.cosines, criteria.gains
    scores = {"cosine %": cosines, "gain": gains}
    scores = {title: values for title, values in scores.items() if values}
    header = ["vector", *scores]
    rows: list[list[object]] = [[name, *(v[name] for v in scores.values())] for name in order]
    more: dict[str, Any] = {"target": task.name, "order": order, "labels": labels, "steps": steps}
    agreed = ""
    if truth:
        real = [_real_gain(session, task, criteria.vectors[name]) for name in order]
        header += ["real gain", "alpha"]
        rows = [[*row, *measured] for row, measured in zip(rows, real, strict=True)]
        more["agreement"] = {
            title.removesuffix(" %"): spearman(
                [values[name] for name in order], [gain for gain, _ in real]
            )
            for title, values in scores.items()
        }
        correlations = ", ".join(f"{name} {value:.2f}" for name, value in more["agreement"].items())
        agreed = f"; rank correlation with the real gain: {correlations}"
    shown = ", gains times 100" if session.scoring is PROGRAMS else ""
    title = f"What should help {task.name} most{shown}: {order[0]}{agreed}"
    return Outcome(title, header, rows, lambda axes: _draw(axes, header, rows), more)


def _real_gain(session: EditSession, task: Task, vector: TaskVector) -> tuple[float, str]:
    """Return the gain of a vector on test data with its best alpha, and that alpha."""
    trial = session.trial({"": vector}, Goal(even_weights([task])))
    choice = race(trial.measurements, [(0.05 * i,) for i in range(len(ALPHAS))])
    alpha = choice.alpha if isinstance(choice.alpha, float) else choice.alpha[0]
    before, after = (
        session.scoring.unit.of(session.measure(vector * a, "test").scores[task.name])
        for a in (0.0, alpha)
    )
    return after - before, f"{alpha:g}"


def spearman(a: list[float], b: list[float]) -> float:
    """Return Spearman's rank correlation; equal values share their mean rank.

    >>> spearman([0.1, 0.5, 0.3], [1, 9, 4])
    1.0
    """

    def ranks(values: list[float]) -> torch.Tensor:
        x = torch.tensor(values, dtype=torch.float64)
        return ((x[:, None] > x).sum(1) + ((x[:, None] == x).sum(1) - 1) / 2).double()

    if len(a) < 2:
        return float("nan")
    return round(float(torch.corrcoef(torch.stack([ranks(a), ranks(b)]))[0, 1]), 12)


def _draw(axes: Any, header: list[str], rows: list[list[Any]]) -> None:
    """Draw horizontal bars, one for each criterion of each vector."""
    columns = [i for i, title in enumerate(header) if title in ("cosine %", "gain", "real gain")]
    height = 0.8 / len(columns)
    for k, i in enumerate(columns):
        shift = (k - (len(columns) - 1) / 2) * height
        axes.barh(
            [j + shift for j in range(len(rows))],
            [100 * row[i] for row in rows],
            height=0.9 * height,
            color=(COLORS[0], COLORS[1], COLORS[-1])[k],
            label=header[i],
        )
    axes.set_yticks(range(len(rows)), [row[0] for row in rows])
    axes.invert_yaxis()
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.set_xlabel("points; cosine in %")
    axes.legend(frameon=False, fontsize=9)
