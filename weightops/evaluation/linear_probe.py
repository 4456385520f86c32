"""The linear probe: the accuracy of a linear classifier that is trained on frozen features."""

from __future__ import annotations

from typing import Any

from weightops.errors import OptionError, TaskError
from weightops.evaluation.image_model import ImageModel
from weightops.evaluation.zero_shot import encode_split, metrics
from weightops.support.lazy import F, torch
from weightops.tasks.split import split_indices
from weightops.tasks.task import Task

DECAYS = tuple(10.0**-power for power in range(7))
"""The candidates for lambda."""


@torch.inference_mode(False)
def linear_probe(
    model: ImageModel, task: Task, split: str, *, batch_size: int = 256
) -> dict[str, Any]:
    """Measure the accuracy of a logistic regression on frozen image features (arXiv 2103.00020).

    The regression is fitted to the standardised features of the training images by L-BFGS, which
    minimises ``mean_i -log p(y_i | x_i) + lambda / 2 * ||W||^2``. Lambda is the best of 1, 0.1,
    ..., 1e-6 on a tenth of the training images when fitted to the others; of equals, the largest.
    With that lambda, the regression is fitted to all training images.

    Args:
        model: a model with an image encoder, or a classifier, whose last layer is left out.
        task: the task.
        split: "test" or "validation".
        batch_size: images at a time.

    Returns:
        ``lp_acc1``, ``lp_acc5`` (NaN under five classes) and ``lp_mean_per_class_recall``, each in
        [0, 1]; ``n``, the number of images; ``lp_decay``, the lambda, and the images that it was
        ``chosen_on``.

    Raises:
        OptionError: for the training split.
        TaskError: if the task has no classes, or fewer than two training images.
    """
    if split == "train":
        raise OptionError(
            "a linear probe is fitted on the training images",
            hint='score it with split="test" or split="validation"',
        )
    labels = model.pixels(task, "train").labels
    if not task.classes or len(labels) < 2:
        raise TaskError(
            f"{task.name} has {len(task.classes)} classes and {len(labels)} training images: "
            "a probe needs some of each"
        )
    classes = len(task.classes)
    train = encode_split(model, task, "train", batch_size=batch_size, features=True)
    mean, deviation = train.mean(0), train.std(0).clamp(min=1e-6)
    train = (train - mean) / deviation
    decay = _best_decay(train, labels, classes)
    weights = fit_logistic_regression(train, labels, classes, decay)
    features = encode_split(model, task, split, batch_size=batch_size, features=True)
    scores = _logits((features - mean) / deviation, weights)
    guesses = scores.topk(min(5, classes), dim=1).indices.cpu()
    result = metrics(guesses, model.pixels(task, split).labels, classes)
    count = result.pop("n")
    named = {f"lp_{name}": value for name, value in result.items()}
    return {**named, "n": count, "lp_decay": decay, "chosen_on": "a tenth of the training images"}


def _best_decay(features: torch.Tensor, labels: torch.Tensor, classes: int) -> float:
    """Return the lambda that is best on a tenth of the images when fitted to the others."""
    tenth = max(len(labels) // 10, 1)
    indices = split_indices(labels.numpy(), {"fit": len(labels) - tenth, "held_out": tenth})
    fit, held_out = torch.from_numpy(indices["fit"]), torch.from_numpy(indices["held_out"])
    best_accuracy, best_decay, weights = -1.0, DECAYS[0], None
    for decay in DECAYS:
        weights = fit_logistic_regression(features[fit], labels[fit], classes, decay, weights)
        guesses = _logits(features[held_out], weights).argmax(1).cpu()
        accuracy = (guesses == labels[held_out]).double().mean().item()
        if accuracy > best_accuracy:
            best_accuracy, best_decay = accuracy, decay
    return best_decay


def fit_logistic_regression(
    features: torch.Tensor,
    labels: torch.Tensor,
    classes: int,
    decay: float,
    start: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the weights and, as the last row, biases, shape ``(dim + 1, classes)``.

    Args:
        features: shape ``(n, dim)``.
        labels: class indices, shape ``(n,)``.
        classes: the number of classes.
        decay: lambda, which applies to the weights and not to the biases.
        start: weights and biases to start from; zero by default.
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
        penalty = decay / 2 * weights[:-1].square().sum()
        value = F.cross_entropy(_logits(features, weights), labels) + penalty
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    return weights.detach()


def _logits(features: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return features @ weights[:-1] + weights[-1]
