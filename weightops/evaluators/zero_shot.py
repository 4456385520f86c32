"""Zero-shot classification: the accuracy of an image encoder with a frozen head made from text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from weightops.checkpoints.checkpoint import CheckpointLike
from weightops.evaluators.clip import Clip, prompts_id
from weightops.tasks.table import as_tasks as as_tasks
from weightops.tasks.task import Task

Metrics = dict[str, float]


def evaluate(
    model: CheckpointLike | Clip,
    tasks: str | Task | Iterable[str | Task],
    *,
    split: str = "test",
    details: bool = False,
    batch_size: int = 256,
    device: str = "auto",
) -> dict[str, dict[str, Any]]:
    """Score a model on tasks, zero-shot.

    Args:
        model: anything with a known architecture (see `open_checkpoint`), or a `Clip`, which keeps pixels between calls.
        tasks: names or `Task`s.
        split: "test", "validation" or "train".
        details: add ``per_class_recall`` and ``confusion`` (rows: truth, columns: guess).
        batch_size: images at a time.
        device: "auto", "cpu", "cuda", ...

    Returns:
        task -> ``acc1``, ``acc5`` (NaN under five classes), ``mean_per_class_recall``, each in [0, 1], and ``n``.

    Raises:
        UnknownNameError: for a task that isn't known.
        TaskError: if its images can't be had.
    """
    clip = Clip.open(model, device)
    return {task.name: score(clip, task, split, details=details, batch_size=batch_size) for task in as_tasks(tasks)}


def score(clip: Clip, task: Task, split: str, *, details: bool = False, batch_size: int = 256) -> dict[str, Any]:
    """The metrics of one task; see `evaluate`."""
    guesses = predict(clip, task, split, batch_size=batch_size)
    return metrics(guesses, clip.pixels(task, split).labels, len(task.classes), details=details)


def predict(
    clip: Clip, task: Task, split: str, *, batch_size: int = 256, only: npt.NDArray[np.int64] | None = None
) -> torch.Tensor:
    """The five (or fewer) likeliest classes of each image (or of ``only`` some), the likeliest first, shape ``(n, 5)``."""
    few = min(5, len(task.classes))
    batches = logits(clip, task, split, batch_size=batch_size, only=only)
    guesses = [batch.topk(few, dim=1).indices.cpu() for batch in batches]
    return torch.cat([torch.empty((0, few), dtype=torch.int64), *guesses])


@torch.no_grad()
def logits(
    clip: Clip, task: Task, split: str, *, batch_size: int = 256, only: npt.NDArray[np.int64] | None = None
) -> Iterator[torch.Tensor]:
    """The logits of a split's images in their order, shape ``(batch_size, classes)`` or fewer at a time."""
    clip.module.eval()
    head = clip.zero_shot_head(task)
    pixels = clip.pixels(task, split)
    wanted = np.arange(len(pixels)) if only is None else only
    with tqdm(total=len(wanted), desc=f"{task.name} {split}", unit="images", delay=1, leave=False) as bar:
        for start in range(0, len(wanted), batch_size):
            indices = wanted[start : start + batch_size]
            yield clip.encode_image(pixels.batch(indices)) @ head.T
            bar.update(len(indices))


def metrics(guesses: torch.Tensor, labels: torch.Tensor, classes: int, *, details: bool = False) -> dict[str, Any]:
    """Accuracies from the likeliest classes (shape ``(n, k)``) and labels (``(n,)``). Classes without images don't count for recall."""
    hits = guesses == labels[:, None]
    confusion = torch.bincount(labels * classes + guesses[:, 0], minlength=classes * classes).view(classes, classes)
    totals = confusion.sum(1)
    recall = confusion.diagonal()[totals > 0].double() / totals[totals > 0]
    result: dict[str, Any] = {
        "acc1": hits[:, 0].double().mean().item(),
        "acc5": hits.any(1).double().mean().item() if classes >= 5 else math.nan,
        "mean_per_class_recall": recall.mean().item(),
        "n": len(labels),
    }
    if details:
        result["per_class_recall"] = [
            n / t if t else math.nan for n, t in zip(confusion.diagonal().tolist(), totals.tolist(), strict=True)
        ]
        result["confusion"] = confusion.tolist()
    return result


def record(
    clip: Clip, task: Task, split: str, scores: Mapping[str, Any], fingerprint: str | None = None
) -> dict[str, Any]:
    """A result as CLIP_benchmark writes it, and what it leaves out: the split, the source of the images, the prompts.

    Args:
        clip: the model.
        task: the task.
        split: its split.
        scores: what `score` gave.
        fingerprint: of the weights that were scored; by default those that the model was made from.
    """
    return {
        "dataset": task.name,
        "model": clip.base.ref,
        "pretrained": fingerprint or clip.base.fingerprint,
        "task": "zeroshot_classification",
        "metrics": dict(scores),
        "language": "en",
        "split": split,
        "source": task.source,
        "prompts": prompts_id(task),
    }
