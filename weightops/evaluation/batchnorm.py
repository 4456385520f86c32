"""Recompute the running statistics of batch normalisation, which averaged weights need."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeGuard

import numpy as np
import torch
from torch import nn

from weightops.algebra.linear_form import LinearForm
from weightops.algebra.provenance import provenance
from weightops.checkpoints.checkpoint import Checkpoint
from weightops.checkpoints.formats.memory import MemorySource
from weightops.checkpoints.opening import CheckpointLike
from weightops.errors import OptionError
from weightops.evaluation.image_model import ImageModel
from weightops.tasks.table import TaskLike, as_task
from weightops.tasks.task import Task


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
    form = LinearForm.of(_RecomputedSource(state, base, task))
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
                encoder(pixels.batch(order[start : start + size]).to(model.device))
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
    encoder: nn.Module = model.module.get_submodule(model.trained_prefix.removesuffix("."))
    if not any(map(_has_statistics, encoder.modules())):
        raise OptionError(
            f"{model.base.ref} has no batch normalisation: there is nothing to recompute"
        )
    return encoder


class _RecomputedSource(MemorySource):
    """Weights with recomputed statistics, which record the task and the origin of the weights."""

    def __init__(self, state: Mapping[str, torch.Tensor], model: Checkpoint, task: Task) -> None:
        super().__init__(state, f"{model.ref} with batch statistics of {task.name}")
        self._record = {"batchnorm": task.name, "model": provenance(model.form)}

    def describe(self) -> dict[str, object]:
        return {**super().describe(), **self._record}
