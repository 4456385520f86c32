"""Zero-shot classification: the accuracy of an image encoder with a frozen head made from text."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from weightops.errors import TaskError
from weightops.evaluation.image_model import ImageModel, prompts_id
from weightops.tasks.task import Task

Metrics = dict[str, float]


def zero_shot(
    clip: ImageModel, task: Task, split: str, *, batch_size: int = 256, details: bool = False
) -> dict[str, Any]:
    """Accuracy with the frozen head that the class names and prompts make, or with a classifier's own.

    Args:
        clip: the model.
        task: the task.
        split: "test", "validation" or "train".
        batch_size: images at a time.
        details: add ``per_class_recall`` and ``confusion`` (rows: truth, columns: guess).

    Returns:
        ``acc1``, ``acc5`` (NaN under five classes), ``mean_per_class_recall``, each in [0, 1], and ``n``.
    """
    guesses = predict(clip, task, split, batch_size=batch_size)
    return metrics(guesses, clip.pixels(task, split).labels, len(task.classes), details=details)


def predict(
    clip: ImageModel,
    task: Task,
    split: str,
    *,
    batch_size: int = 256,
    only: npt.NDArray[np.int64] | None = None,
) -> torch.Tensor:
    """The five (or fewer) likeliest classes of each image (or of ``only`` some), the likeliest first, shape ``(n, 5)``."""
    few = min(5, len(task.classes))
    batches = logits(clip, task, split, batch_size=batch_size, only=only)
    guesses = [batch.topk(few, dim=1).indices.cpu() for batch in batches]
    return torch.cat([torch.empty((0, few), dtype=torch.int64), *guesses])


@torch.no_grad()
def logits(
    clip: ImageModel,
    task: Task,
    split: str,
    *,
    batch_size: int = 256,
    only: npt.NDArray[np.int64] | None = None,
) -> Iterator[torch.Tensor]:
    """The logits of a split's images in their order, shape ``(batch_size, classes)`` or fewer at a time."""
    head = clip.zero_shot_head(task)
    for images in batches(clip, task, split, batch_size=batch_size, only=only):
        yield clip.encode_image(images) @ head.T


@torch.no_grad()
def encoded(
    clip: ImageModel, task: Task, split: str, *, batch_size: int = 256, features: bool = False
) -> torch.Tensor:
    """What an image encoder makes of a split's images: unit vectors, or with ``features`` what a head is put on; shape ``(n, dim)``."""
    encode = clip.features if features else clip.encode_image
    return torch.cat(
        [encode(images) for images in batches(clip, task, split, batch_size=batch_size)]
    )


def batches(
    clip: ImageModel,
    task: Task,
    split: str,
    *,
    batch_size: int,
    only: npt.NDArray[np.int64] | None = None,
) -> Iterator[torch.Tensor]:
    """A split's images in their order, ready for the model, which is put into its mode for inference."""
    clip.module.eval()
    pixels = clip.pixels(task, split)
    if not len(pixels):
        raise TaskError(f"{task.name} has no images for {split}")
    wanted = np.arange(len(pixels)) if only is None else only
    with tqdm(
        total=len(wanted), desc=f"{task.name} {split}", unit="images", delay=1, leave=False
    ) as bar:
        for start in range(0, len(wanted), batch_size):
            indices = wanted[start : start + batch_size]
            yield pixels.batch(indices)
            bar.update(len(indices))


def metrics(
    guesses: torch.Tensor, labels: torch.Tensor, classes: int, *, details: bool = False
) -> dict[str, Any]:
    """Accuracies from the likeliest classes (shape ``(n, k)``) and labels (``(n,)``). Classes without images don't count for recall."""
    hits = guesses == labels[:, None]
    confusion = torch.bincount(labels * classes + guesses[:, 0], minlength=classes * classes).view(
        classes, classes
    )
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
            n / t if t else math.nan
            for n, t in zip(confusion.diagonal().tolist(), totals.tolist(), strict=True)
        ]
        result["confusion"] = confusion.tolist()
    return result


def record(
    clip: ImageModel,
    task: Task,
    split: str,
    scores: Mapping[str, Any],
    fingerprint: str | None = None,
    kind: str = "zeroshot_classification",
) -> dict[str, Any]:
    """A result as CLIP_benchmark writes it, and what it leaves out: the split, the source of the images, the prompts.

    Args:
        clip: the model.
        task: the task.
        split: its split.
        scores: what an evaluator gave.
        fingerprint: of the weights that were scored; by default those that the model was made from.
        kind: what CLIP_benchmark calls the evaluator.
    """
    return {
        "dataset": task.name,
        "model": clip.base.ref,
        "pretrained": fingerprint or clip.base.fingerprint,
        "task": kind,
        "metrics": dict(scores),
        "language": "en",
        "split": split,
        "source": task.source,
        "prompts": prompts_id(task),
    }
