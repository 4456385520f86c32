"""The runs of a model on data: of an image model on a task, of a language model on a text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from weightops.algebra.devices import pick_device
from weightops.checkpoints.checkpoint import Checkpoint
from weightops.errors import CheckpointError, OptionError, TaskError
from weightops.evaluation.image_model import ImageModel
from weightops.evaluation.linearized import LinearizedModel
from weightops.evaluation.perplexity import token_blocks
from weightops.support.lazy import nn, np, torch
from weightops.support.progress import Bar, progress
from weightops.support.text import portable
from weightops.tasks.table import TaskLike, as_task
from weightops.tasks.task import Task

Batch: TypeAlias = "tuple[torch.Tensor, torch.Tensor]"
"""Inputs of a model, and their labels: of images, or of tokens."""


class Run(NamedTuple):
    """A model and the data that it is run on.

    Attributes:
        module: the module, whose parameters are meant.
        logits: gives the logits of inputs, shape ``(n, classes)`` or ``(n, tokens, vocabulary)``.
        read: gives the batches of a size, of some of the data.
        chosen: the numbers of these: of images in a fixed random order, or of blocks of text.
        data: what they are, for the record.
        bar: the bar of a longer run that it is part of.
    """

    module: nn.Module
    logits: Callable[[torch.Tensor], torch.Tensor]
    read: Callable[[range, int], Iterator[Batch]]
    chosen: range
    data: Mapping[str, Any]
    bar: Bar | None = None

    def batches(self, size: int) -> Iterator[Batch]:
        """Read the data in batches of a size."""
        return self.read(self.chosen, size)

    def part(self, start: int, stop: int, bar: Bar) -> Run:
        """Return a run on a part of the data, which is shown by a bar."""
        return self._replace(chosen=self.chosen[start:stop], bar=bar)

    def progress(self, what: str, *, done: int = 0) -> AbstractContextManager[Bar]:
        """Show how many images or blocks are done, of which a run before may have done some."""
        if self.bar is not None:
            return nullcontext(self.bar)
        unit = "blocks" if "text" in self.data else "images"
        return progress(len(self.chosen), what, unit, done=done)


def run_on(
    checkpoint: Checkpoint,
    task: TaskLike | None,
    text: str | Path | None,
    split: str,
    images: int,
    device: str,
) -> Run:
    """Return a run of a checkpoint's model on a task or a text.

    Raises:
        OptionError: for neither or both of a task and a text.
    """
    if text is not None and task is None:
        return on_text(checkpoint, text, images, device)
    if text is None and task is not None:
        image_model = ImageModel.open(checkpoint, device, precision="float32")
        return on_images(image_model, as_task(task), split, images)
    raise OptionError("a statistic is of a task, or of a text for a language model", hint="task=")


def on_images(image_model: ImageModel, task: Task, split: str, images: int) -> Run:
    """Return a run of a model on the first images of a split in a fixed random order.

    Raises:
        TaskError: if there are none, or the model has no head for the task.
        CheckpointError: if the model is linearised.
    """
    if isinstance(image_model, LinearizedModel):
        raise CheckpointError(
            f"{image_model.base.ref} is linearised at {image_model.at.ref}: no statistic is of it",
            hint="methods without statistics merge it",
        )
    module = image_model.module.eval()
    head = image_model.zero_shot_head(task)
    pixels = image_model.pixels(task, split)
    order = np.random.default_rng(0).permutation(len(pixels))[:images]
    if not len(order):
        raise TaskError(f"{task.name} has no images for {split}")

    def logits(inputs: torch.Tensor) -> torch.Tensor:
        dtype = next(module.parameters()).dtype
        return image_model.encode_image(inputs.to(dtype)) @ head.T

    def read(chosen: range, size: int) -> Iterator[Batch]:
        for first in range(0, len(chosen), size):
            batch = order[chosen[first : first + size]]
            yield pixels.batch(batch), pixels.labels[torch.from_numpy(batch)]

    data = {"task": task.name, "split": split, **task.reading(split)}
    return Run(module, logits, read, range(len(order)), data)


def on_text(checkpoint: Checkpoint, text: str | Path, blocks: int, device: str) -> Run:
    """Return a run of a language model on the first blocks of a text.

    Raises:
        CheckpointError: if it isn't a language model with a tokenizer.
        TaskError: if the text is too short.
    """
    tokens = token_blocks(checkpoint, text)[:blocks].to(pick_device(device))
    module = checkpoint.model().to(tokens.device)

    def logits(inputs: torch.Tensor) -> torch.Tensor:
        given: torch.Tensor = module(input_ids=inputs).logits
        return given[:, :-1].float()

    def read(chosen: range, size: int) -> Iterator[Batch]:
        for batch in tokens[chosen.start : chosen.stop].split(size):  # type: ignore[no-untyped-call]
            yield batch, batch[:, 1:]

    return Run(module, logits, read, range(len(tokens)), {"text": portable(str(text))})
