"""Which of many task vectors will help a target task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from weightops.checkpoints.opening import CheckpointLike, open_checkpoint
from weightops.errors import OptionError
from weightops.evaluation.zero_shot import predict
from weightops.reports.frontier import COLORS, INK
from weightops.reports.outcome import Outcome
from weightops.search.goal import Goal
from weightops.search.session import EditSession
from weightops.search.strategies import race
from weightops.support.atomic import check_free
from weightops.task_vector import TaskVector
from weightops.tasks.table import as_tasks
from weightops.tasks.task import Images, SomeImages, Task
from weightops.training.config import config_for
from weightops.workflows.base import even

PROBE = 0.3
"""Alpha at which the gain on validation data is looked at."""


def select(
    vectors: Mapping[str, CheckpointLike | TaskVector],
    target: str | Task,
    out: str | Path | None = None,
    *,
    model: CheckpointLike = "embedded",
    labels: int | None = None,
    steps: int = 20,
    truth: bool = False,
    overwrite: bool = False,
    device: str = "auto",
    seed: int = 0,
) -> Outcome:
    r"""Rank task vectors by how much they can be expected to help a target task.

    Two signs: the cosine of each vector with one of a few steps on the target, and what a small step along each (alpha 0.3) gains
    on validation data. They are ranked by the gain where there are labels, by the cosine where there are none.

    Args:
        vectors: by name: vectors, fine-tuned weights, or paths of either.
        target: the task to be helped.
        out: a folder for table, picture and results.
        model: what the vectors are of.
        labels: how many labelled images of the target may be used for each sign; all by default. With 0 the model's own
            guesses take the labels' place for the cosine, and nothing is gained or lost by sight.
        steps: of the fine-tuning that the cosine is taken with.
        truth: measure what each vector really gives on test data, with the alpha that is best on all validation data, and how
            well the order agrees with that (Spearman's rank correlation).
        overwrite: replace ``out``.
        device: "auto", "cpu", "cuda", ...
        seed: of the fine-tuning.
    """
    if not vectors:
        raise OptionError("there are no vectors to choose from")
    if out is not None:
        check_free(Path(out), overwrite=overwrite)
    [task] = as_tasks(target)
    config = config_for(open_checkpoint(model), steps=steps, seed=seed)
    bench = EditSession(model, [task], config=config, device=device)
    opened = {name: bench.vector(given) for name, given in vectors.items()}
    probe = bench.learn(_few(bench, task, labels))
    share = 1.0 if labels is None else min(1.0, labels / task.sizes["validation"])
    cosines = {name: vector.cosine(probe) for name, vector in opened.items()}
    gains = {}
    for name, vector in opened.items() if share else ():
        sheet = bench.trial({name: vector}, Goal(even([task]))).sheet
        hits, base = sheet.see((PROBE,), share), sheet.see((0.0,), share)
        gains[name] = sheet.goal.gain(hits, base)[0]
    order = sorted(opened, key=lambda name: (-gains.get(name, 0.0), -cosines[name]))
    header = ["vector", "cosine %", *(["gain"] if gains else [])]
    rows: list[list[object]] = [
        [name, cosines[name], *([gains[name]] if gains else [])] for name in order
    ]
    more: dict[str, Any] = {"target": task.name, "order": order, "labels": labels, "steps": steps}
    if truth:
        real = {name: _real(bench, task, vector) for name, vector in opened.items()}
        header += ["real gain", "alpha"]
        rows = [[*row, *real[str(row[0])]] for row in rows]
        column = [real[name][0] for name in order]
        signs = {
            "cosine": [cosines[name] for name in order],
            **({"gain": [gains[name] for name in order]} if gains else {}),
        }
        more["agreement"] = {name: spearman(values, column) for name, values in signs.items()}
    agreed = (
        "; rank correlation with the real gain: "
        + ", ".join(f"{k} {v:.2f}" for k, v in more["agreement"].items())
        if truth
        else ""
    )
    outcome = Outcome(
        f"What should help {task.name} most: {order[0]}{agreed}",
        header,
        rows,
        lambda axes: _draw(axes, header, rows),
        more,
    )
    if out is not None:
        outcome.write(Path(out), {"model": bench.base.ref}, overwrite=overwrite)
    return outcome


def _few(bench: EditSession, task: Task, labels: int | None) -> Task:
    """The target with as many labelled training images as there are; with none, the model's own guesses."""
    if labels is None:
        return task
    if labels == 0:
        guesses = predict(bench.clip, task, "train")[:, 0].numpy()
        order = np.arange(len(guesses))
    else:
        order = np.random.default_rng(0).permutation(task.sizes["train"])[:labels]

    def load(split: str) -> Images:
        images = task.load(split)
        return (
            SomeImages(images, order, guesses if labels == 0 else images.labels[order])
            if split == "train"
            else images
        )

    return replace(task, load=load)


def _real(bench: EditSession, task: Task, vector: TaskVector) -> tuple[float, str]:
    """What a vector gains on test data with its best alpha, and that."""
    trial = bench.trial({"": vector}, Goal(even([task])))
    choice = race(trial.sheet, [(0.05 * i,) for i in range(21)])
    alpha = choice.alpha if isinstance(choice.alpha, float) else choice.alpha[0]
    before, after = (
        bench.measure(vector * a, "test").scores[task.name]["acc1"] for a in (0.0, alpha)
    )
    return after - before, f"{alpha:g}"


def spearman(a: list[float], b: list[float]) -> float:
    """Spearman's rank correlation; ties share their mean rank.

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
    columns = [i for i, title in enumerate(header) if title in ("cosine %", "gain", "real gain")]
    height = 0.8 / len(columns)
    for k, i in enumerate(columns):
        places = [j + (k - (len(columns) - 1) / 2) * height for j in range(len(rows))]
        axes.barh(
            places,
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
