"""The linear probe: what a classifier that is trained on frozen features gets right."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from weightops.errors import OptionError, TaskError
from weightops.evaluation.image_model import ImageModel
from weightops.evaluation.zero_shot import encoded, metrics
from weightops.tasks.split import split_indices
from weightops.tasks.task import Task

DECAYS = tuple(10.0**-power for power in range(7))


@torch.inference_mode(False)
def linear_probe(
    clip: ImageModel, task: Task, split: str, *, batch_size: int = 256
) -> dict[str, Any]:
    r"""Accuracy of multinomial logistic regression on the image encoder's features, fitted on the training images (arXiv 2103.00020).

    It minimises :math:`\frac1n \sum_i -\log p(y_i \mid x_i) + \frac\lambda2 \lVert W \rVert^2` over standardised features by L-BFGS.
    :math:`\lambda`, one of :math:`1, 10^{-1}, \dots, 10^{-6}`, is the one that is best on a tenth of the training images when fitted on the
    rest, the largest of equals; then it is fitted on all of them.

    Args:
        clip: a model with an image encoder, or a classifier, whose last layer is left out.
        task: the task.
        split: "test" or "validation".
        batch_size: images at a time.

    Returns:
        ``lp_acc1``, ``lp_acc5`` (NaN under five classes), ``lp_mean_per_class_recall``, each in [0, 1]; ``n``; ``lp_decay``, the
        :math:`\lambda`, and what it was ``chosen_on``.

    Raises:
        OptionError: for the training split.
        TaskError: if there are no classes, or too few images to fit to.
    """
    if split == "train":
        raise OptionError(
            "a linear probe is fitted on the training images: score it on test or validation"
        )
    truth = clip.pixels(task, "train").labels
    if not task.classes or len(truth) < 2:
        raise TaskError(
            f"{task.name} has {len(task.classes)} classes and {len(truth)} training images: a probe needs some of each"
        )
    train = encoded(clip, task, "train", batch_size=batch_size, features=True)
    mean, deviation = train.mean(0), train.std(0).clamp(min=1e-6)
    train = (train - mean) / deviation
    fewer = max(len(truth) // 10, 1)
    parts = split_indices(truth.numpy(), {"fit": len(truth) - fewer, "held_out": fewer})
    fit, held_out = (torch.from_numpy(parts[name]) for name in ("fit", "held_out"))
    classes = len(task.classes)
    best, decay, weights = -1.0, DECAYS[0], None
    for candidate in DECAYS:
        weights = fitted(train[fit], truth[fit], classes, candidate, weights)
        right = (
            (_logits(train[held_out], weights).argmax(1).cpu() == truth[held_out])
            .double()
            .mean()
            .item()
        )
        if right > best:
            best, decay = right, candidate
    weights = fitted(train, truth, classes, decay)
    there = (encoded(clip, task, split, batch_size=batch_size, features=True) - mean) / deviation
    guesses = _logits(there, weights).topk(min(5, classes), dim=1).indices.cpu()
    scores = metrics(guesses, clip.pixels(task, split).labels, classes)
    count = scores.pop("n")
    named = {f"lp_{name}": value for name, value in scores.items()}
    return {**named, "n": count, "lp_decay": decay, "chosen_on": "a tenth of the training images"}


def fitted(
    features: torch.Tensor,
    labels: torch.Tensor,
    classes: int,
    decay: float,
    start: torch.Tensor | None = None,
) -> torch.Tensor:
    """Weights and, as the last row, biases of a logistic regression, shape ``(dim + 1, classes)``.

    Args:
        features: shape ``(n, dim)``.
        labels: shape ``(n,)``.
        classes: how many.
        decay: of the weights, not of the biases.
        start: where to begin; at zero by default.
    """
    labels = labels.to(features.device)
    zero = features.new_zeros(features.shape[1] + 1, classes)
    weights = (zero if start is None else start.clone()).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weights],
        max_iter=500,
        tolerance_grad=1e-6,
        tolerance_change=1e-10,
        line_search_fn="strong_wolfe",
    )

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = (
            F.cross_entropy(_logits(features, weights), labels)
            + decay / 2 * weights[:-1].square().sum()
        )
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    return weights.detach()


def _logits(features: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return features @ weights[:-1] + weights[-1]
