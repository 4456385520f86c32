"""An evaluator of your own: how well a model knows how sure it may be.

python own_evaluator.py MODEL TASK
"""

import sys

import torch

import weightops
from weightops.evaluation.zero_shot import logits


@weightops.evaluator
def calibration(
    model: weightops.ImageModel, task: weightops.Task, split: str, *, batch_size: int = 256
) -> dict[str, float]:
    """Compare the mean confidence with the accuracy.

    Args:
        model: the model.
        task: the task.
        split: "train", "validation" or "test".
        batch_size: images at a time.

    Returns:
        ``confidence``, ``acc1``, ``overconfidence`` (their difference), and ``n``, how many images.
    """
    scores = torch.cat(list(logits(model, task, split, batch_size=batch_size))).cpu()
    confidence, guesses = scores.softmax(1).max(1)
    labels = torch.as_tensor(task.load(split).labels)
    accuracy = (guesses == labels).double().mean().item()
    mean = confidence.double().mean().item()
    return {
        "confidence": mean,
        "acc1": accuracy,
        "overconfidence": mean - accuracy,
        "n": len(labels),
    }


if __name__ == "__main__":
    model, task = sys.argv[1:]
    scores = weightops.evaluate(model, task, evaluator="calibration")
    for name, row in scores.items():
        print(f"{name}: {row['confidence']:.1%} confident, {row['acc1']:.1%} right")
