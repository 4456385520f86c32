"""Running statistics of batch normalisation for edited weights: recomputed, or the base's."""

from __future__ import annotations

from typing import TypeGuard

import numpy as np

from weightops.algebra.linear_form import LinearForm
from weightops.algebra.names import escape
from weightops.algebra.provenance import provenance
from weightops.checkpoints.checkpoint import Checkpoint
from weightops.checkpoints.formats.memory import MemorySource
from weightops.checkpoints.opening import CheckpointLike, open_checkpoint
from weightops.errors import OptionError
from weightops.evaluation.image_model import ImageModel
from weightops.support.lazy import nn, torch
from weightops.task_vector import TaskVector
from weightops.tasks.table import TaskLike, as_task
from weightops.tasks.task import Task

BASE = "base"
"""The word that keeps the base's running statistics, in place of a task to recompute them on."""

BatchNorm = TaskLike
"""Where running statistics come from: a task on whose images they are recomputed, or `BASE`."""


def as_batchnorm(choice: BatchNorm | None) -> Task | str | None:
    """Return the task of a choice of running statistics, or `BASE`, or None."""
    return choice if choice is None or choice == BASE else as_task(choice)


def with_batchnorm(
    edited: Checkpoint, choice: BatchNorm, base: CheckpointLike | None, device: str = "auto"
) -> Checkpoint:
    """Return edited weights with running statistics that are recomputed, or their base's.

    Args:
        edited: the weights.
        choice: a task, see `recompute_batchnorm`, or `BASE`.
        base: the model whose statistics are kept.
        device: where to recompute them.

    Raises:
        OptionError: if there is no base, or no batch normalisation.
    """
    if choice != BASE:
        return recompute_batchnorm(edited, choice, device=device)
    if base is None:
        raise OptionError(f"{edited.ref} has no base whose statistics to keep", hint="give base=")
    return without_statistics(TaskVector(base, edited)).apply(open_checkpoint(base))


def without_statistics(vector: TaskVector) -> TaskVector:
    """Return a task vector that leaves running means and variances as the base has them.

    Raises:
        OptionError: if there are none.
    """
    ends = (".running_mean", ".running_var")
    names = [name for name in vector if name.endswith(ends)]
    if not names:
        raise OptionError(f"{vector} has no batch normalisation: there are no statistics to keep")
    return vector * {**{escape(name): 0.0 for name in names}, "*": 1.0}


def recompute_batchnorm(
    model: CheckpointLike | ImageModel,
    task: TaskLike,
    *,
    images: int = 10_000,
    batch_size: int = 128,
    device: str = "auto",
) -> Checkpoint:
    """Return weights with running means and variances recomputed on a task (arXiv 1803.05407).

    Only the statistics of the image encoder or classifier change.

    Args:
        model: anything with a known architecture; the module of an `ImageModel` is changed.
        task: a task or its name, whose training images are used, in a fixed random order.
        images: the largest number of images to use.
        batch_size: images at a time. All batches are full and have equal weight.
        device: "auto", "cpu", "cuda", ...

    Returns:
        The checkpoint, in memory, with the model's architecture.

    Raises:
        OptionError: if the part that sees images has no batch normalisation with running
            statistics, or the task has fewer than two training images.
    """
    image_model, task = ImageModel.open(model, device, precision="float32"), as_task(task)
    recompute_batchnorm_(image_model, task, images=images, batch_size=batch_size)
    base = image_model.base
    state = {
        name: tensor.detach().to("cpu", base.specs[name].dtype, copy=True)
        for name, tensor in image_model.module.state_dict().items()
    }
    record = {"batchnorm": task.name, "model": provenance(base.form)}
    ref = f"{base.ref} with batch statistics of {task.name}"
    form = LinearForm.of(MemorySource(state, ref, record=record))
    return base.with_form(form, base.architecture)


def recompute_batchnorm_(
    model: ImageModel, task: Task, *, images: int = 10_000, batch_size: int = 128
) -> None:
    """Recompute the statistics in the model's module: see `recompute_batchnorm`.

    Only layers of batch normalisation are in training mode. All else is as in evaluation, so that
    nothing is random.
    """
    encoder = encoder_with_batchnorm(model)
    pixels = model.pixels(task, "train")
    order = np.random.default_rng(0).permutation(len(pixels))[:images]
    size = min(batch_size, len(order))
    if size < 2:
        raise OptionError(f"{task.name} has too few training images for statistics")

    layers = [module for module in encoder.modules() if _has_statistics(module)]
    momenta = [layer.momentum for layer in layers]
    model.module.eval()
    try:
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None  # the mean over batches
            layer.train()  # what is random in training, such as stochastic depth, stays off
        with torch.no_grad():
            for start in range(0, len(order) - size + 1, size):
                encoder(pixels.batch(order[start : start + size]))
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
            layer.eval()


def _has_statistics(module: nn.Module) -> TypeGuard[nn.modules.batchnorm._BatchNorm]:
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats


def encoder_with_batchnorm(model: ImageModel) -> nn.Module:
    """Return the part of a model that sees images.

    Raises:
        OptionError: if that part has no batch normalisation with running statistics.
    """
    encoder, _ = model.trained
    if not any(map(_has_statistics, encoder.modules())):
        raise OptionError(
            f"{model.base.ref} has no batch normalisation: there is nothing to recompute"
        )
    return encoder
