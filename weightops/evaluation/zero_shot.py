"""Zero-shot classification: the accuracy of an image encoder with a frozen head made from text."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from weightops.errors import TaskError
from weightops.evaluation.batch_statistics import check_running_variances
from weightops.evaluation.image_model import ImageModel, check_finite, prompts_id
from weightops.support.lazy import torch, without_gradients
from weightops.support.progress import progress
from weightops.tasks.task import Task


def zero_shot(
    model: ImageModel, task: Task, split: str, *, batch_size: int = 256, details: bool = False
) -> dict[str, Any]:
    """Measure the accuracy with the head made from prompts, or with a classifier's own head.

    Args:
        model: the model.
        task: the task.
        split: "test", "validation" or "train".
        batch_size: images at a time.
        details: add ``per_class_recall`` and ``confusion`` (rows: label, columns: prediction).

    Returns:
        ``acc1``, ``acc5`` (NaN under five classes) and ``mean_per_class_recall``, each in [0, 1],
        and ``n``, the number of images.
    """
    guesses = predict(model, task, split, batch_size=batch_size)
    labels = model.pixels(task, split).labels
    return metrics(guesses, labels, len(task.classes), details=details)


def predict(
    model: ImageModel,
    task: Task,
    split: str,
    *,
    batch_size: int = 256,
    only: npt.NDArray[np.int64] | None = None,
) -> torch.Tensor:
    """Return the five likeliest classes of each image, the likeliest first, shape ``(n, 5)``.

    With fewer than five classes, all are returned.

    Args:
        model: the model.
        task: the task.
        split: "test", "validation" or "train".
        batch_size: images at a time.
        only: indices of the images to classify; all by default.

    Raises:
        NonfiniteError: if logits are NaN or infinite: what has no order isn't ranked.
    """
    count = min(5, len(task.classes))
    guesses, bad = [], []
    for batch in logits(model, task, split, batch_size=batch_size, only=only):
        guesses.append(batch.topk(count, dim=1).indices)
        bad.append(~batch.isfinite().all(1))
    check_finite(
        _joined(bad, torch.empty(0, dtype=torch.bool)), f"the logits of {task.name} {split}"
    )
    return _joined(guesses, torch.empty((0, count), dtype=torch.int64))


def _joined(parts: list[torch.Tensor], empty: torch.Tensor) -> torch.Tensor:
    """Return tensors as one, on CPU."""
    return torch.cat([empty, *(part.cpu() for part in parts)])


def logits(
    model: ImageModel,
    task: Task,
    split: str,
    *,
    batch_size: int = 256,
    only: npt.NDArray[np.int64] | None = None,
) -> Iterator[torch.Tensor]:
    """Yield the scores of a split's images in order, shape ``(batch_size, classes)`` or fewer.

    They are cosines, or the outputs of a classifier's own head. ``exp(logit_scale)`` is left out:
    it may overflow, and changes no order.
    """
    head = model.class_features(task)
    for images in image_batches(model, task, split, batch_size=batch_size, only=only):
        with torch.no_grad():
            scores = model.encode_image(images) @ head.T
        yield scores


@without_gradients
def encode_split(
    model: ImageModel, task: Task, split: str, *, batch_size: int = 256, features: bool = False
) -> torch.Tensor:
    """Return the unit features of a split's images, shape ``(n, dim)``.

    Args:
        model: the model.
        task: the task.
        split: "test", "validation" or "train".
        batch_size: images at a time.
        features: return the features that a linear probe is fitted to instead.
    """
    encode = model.features if features else model.encode_image
    batches = image_batches(model, task, split, batch_size=batch_size)
    encoded = torch.cat([encode(images) for images in batches])
    check_finite(~encoded.isfinite().all(1).cpu(), f"the features of {task.name} {split}")
    return encoded


def image_batches(
    model: ImageModel,
    task: Task,
    split: str,
    *,
    batch_size: int,
    only: npt.NDArray[np.int64] | None = None,
) -> Iterator[torch.Tensor]:
    """Yield a split's images in order, ready for the model, which is put into evaluation mode.

    Raises:
        TaskError: if the split has no images.
        NonfiniteError: if a running variance of batch normalisation is negative.
    """
    model.module.eval()
    check_running_variances(model.module, model.base.ref)
    pixels = model.pixels(task, split)
    if not len(pixels):
        raise TaskError(f"{task.name} has no images for {split}")
    indices = np.arange(len(pixels)) if only is None else only
    pixels.prepare(indices)
    with progress(len(indices), f"{task.name} {split}", "images", work=1) as bar:
        for start in range(0, len(indices), batch_size):
            batch = indices[start : start + batch_size]
            yield pixels.batch(batch)
            bar.update(len(batch))


def metrics(
    guesses: torch.Tensor, labels: torch.Tensor, classes: int, *, details: bool = False
) -> dict[str, Any]:
    """Compute accuracies.

    Args:
        guesses: the likeliest classes of each image, the likeliest first, shape ``(n, k)``.
        labels: class indices, shape ``(n,)``.
        classes: the number of classes; those without images don't count for the mean recall.
        details: add ``per_class_recall`` and ``confusion``.
    """
    hits = guesses == labels[:, None]
    totals = torch.bincount(labels, minlength=classes)
    correct = torch.bincount(labels[hits[:, 0]], minlength=classes)
    recall = correct[totals > 0].double() / totals[totals > 0]
    result: dict[str, Any] = {
        "acc1": hits[:, 0].double().mean().item(),
        "acc5": hits.any(1).double().mean().item() if classes >= 5 else math.nan,
        "mean_per_class_recall": recall.mean().item(),
        "n": len(labels),
    }
    if details:
        result["per_class_recall"] = [
            right / total if total else math.nan
            for right, total in zip(correct.tolist(), totals.tolist(), strict=True)
        ]
        pairs = torch.bincount(labels * classes + guesses[:, 0], minlength=classes * classes)
        result["confusion"] = pairs.view(classes, classes).tolist()
    return result


def record(
    model: ImageModel,
    task: Task,
    split: str,
    scores: Mapping[str, Any],
    fingerprint: str | None = None,
    kind: str = "zeroshot_classification",
) -> dict[str, Any]:
    """Return a result in CLIP_benchmark's form, with the split, source of images and prompts added.

    Args:
        model: the model.
        task: the task.
        split: the split that was scored.
        scores: metrics by name.
        fingerprint: the fingerprint of the scored weights, by default of the model's checkpoint.
        kind: CLIP_benchmark's name of the evaluator.
    """
    return {
        "dataset": task.name,
        "model": model.base.ref,
        "pretrained": fingerprint or model.base.fingerprint,
        "task": kind,
        "metrics": dict(scores),
        "language": "en",
        "split": split,
        "prompts": prompts_id(task),
        "precision": model.precision,
        **task.reading(split),
        "class_order": model.class_order(task),
    }
