"""Running statistics of batch normalisation, computed anew on data: averaged weights make other activations than their parts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from weightops.algebra.linear_form import LinearForm, provenance
from weightops.checkpoints.checkpoint import Checkpoint
from weightops.checkpoints.formats.memory import MemorySource
from weightops.checkpoints.opening import CheckpointLike
from weightops.errors import OptionError
from weightops.evaluation.image_model import ImageModel
from weightops.tasks.table import as_tasks
from weightops.tasks.task import Task


def recompute_batchnorm(
    model: CheckpointLike | ImageModel,
    task: str | Task,
    *,
    images: int = 10_000,
    batch_size: int = 128,
    device: str = "auto",
) -> Checkpoint:
    """Weights with the image encoder's, or classifier's, running means and variances made anew (arXiv 1803.05407).

    Args:
        model: anything with a known architecture; a `ImageModel`'s module is changed.
        task: a name or a `Task`; images of its training split, in an order of their own, are used.
        images: how many at most.
        batch_size: images at a time. All batches are full, and count alike.
        device: "auto", "cpu", "cuda", ...

    Returns:
        The weights, in memory, of the model's architecture.

    Raises:
        OptionError: if what is to see images has no batch normalisation with running statistics, or there are no images for a batch.
    """
    clip = ImageModel.open(model, device)
    [task] = as_tasks(task)
    recompute_batchnorm_(clip, task, images=images, batch_size=batch_size)
    state = {
        n: t.detach().to("cpu", clip.base.specs[n].dtype, copy=True)
        for n, t in clip.module.state_dict().items()
    }
    return clip.base.as_of(LinearForm.of(_Restated(state, clip.base, task)), clip.base.architecture)


def recompute_batchnorm_(
    clip: ImageModel, task: Task, *, images: int = 10_000, batch_size: int = 128
) -> None:
    """The same in place, in the module."""
    visual = normalised(clip)
    pixels = clip.pixels(task, "train")
    order = np.random.default_rng(0).permutation(len(pixels))[:images]
    size = min(batch_size, len(order))
    if size < 2:
        raise OptionError(f"{task.name} has too few training images for statistics")

    def batches() -> Iterator[torch.Tensor]:
        for start in range(0, len(order) - size + 1, size):
            yield pixels.batch(order[start : start + size]).to(clip.device)

    update_bn(batches(), visual)


def normalised(clip: ImageModel) -> nn.Module:
    """The part of a model that sees images.

    Raises:
        OptionError: if it has no running statistics.
    """
    visual: nn.Module = clip.module.get_submodule(clip.learns.removesuffix("."))
    if not any(
        isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats
        for m in visual.modules()
    ):
        raise OptionError(
            f"{clip.base.ref} has no batch normalisation: there is nothing to recompute"
        )
    return visual


class _Restated(MemorySource):
    """Weights with batch statistics of their own, which tell what else they are."""

    def __init__(self, state: Mapping[str, torch.Tensor], model: Checkpoint, task: Task) -> None:
        super().__init__(state, f"{model.ref} with batch statistics of {task.name}")
        self._from = {"batchnorm": task.name, "model": provenance(model.form)}

    def describe(self) -> dict[str, object]:
        return {**super().describe(), **self._from}
