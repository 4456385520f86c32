"""`Classifier`: an image classifier with a head of its own, such as timm's."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache
from typing import Any

from weightops.algebra.linear_form import LinearForm
from weightops.algebra.precision import computed_in
from weightops.checkpoints.checkpoint import Checkpoint
from weightops.checkpoints.formats.memory import MemorySource
from weightops.errors import CheckpointError, TaskError
from weightops.evaluation.image_model import ImageModel
from weightops.support.lazy import nn, torch
from weightops.tasks.class_names import ordered, positions
from weightops.tasks.task import Task

log = logging.getLogger("weightops")


class Classifier(ImageModel):
    """A classifier of images with a head of its own, such as timm's; it has no text encoder."""

    @property
    def trained(self) -> tuple[nn.Module, str]:
        return self.module, ""

    @classmethod
    def build(
        cls, checkpoint: Checkpoint, device: torch.device, precision: str, learning: Task | None
    ) -> Classifier:
        """Build a classifier, with a new head if its own doesn't fit the task to learn."""
        if learning is not None:
            checkpoint = _for_learning(checkpoint, learning)
        module: Any = checkpoint.model()

        def no_tokenizer(texts: list[str]) -> torch.Tensor:
            raise CheckpointError(f"{checkpoint.ref} is a classifier, which takes no text")

        parts = (module.to(device), checkpoint.preprocess(), no_tokenizer)
        return cls(*parts, device, checkpoint, precision)

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        """Return logits of images, shape ``(n, classes)``, float32."""
        with computed_in(self.precision, self.device):
            logits: torch.Tensor = self.module(images.to(self.device))
        return logits.float()

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Return the input of the head, shape ``(n, dim)``, float32."""
        with computed_in(self.precision, self.device):
            unpooled = self.module.forward_features(images.to(self.device))
            features: torch.Tensor = self.module.forward_head(unpooled, pre_logits=True)
        return features.float()

    def class_features(self, task: Task) -> torch.Tensor:
        """Return the rows of the identity that pick the output of each class.

        `encode_image` returns the logits of the classifier's own head. Outputs are matched with
        classes by the names that the configuration records, unless the task says their order;
        without names, they are in the task's order, which for a folder is that of torchvision's
        ``ImageFolder``, with a warning.

        Raises:
            TaskError: if the head is for another number of classes, or for classes of other names.
        """
        if self.module.num_classes != len(task.classes):
            raise TaskError(
                f"{self.base.ref} has a head for {self.module.num_classes} classes, "
                f"and {task.name} has {len(task.classes)}",
                hint="fine-tune the model on the task first, which gives it a new head",
            )
        outputs = _outputs(self.base, task)
        if self.class_order(task) == "task" and task.class_order is None:
            _say_order_is_taken(self.base.ref, task.name)
        return torch.eye(len(task.classes), device=self.device)[outputs]

    def zero_shot_head(self, task: Task) -> torch.Tensor:
        """Return `class_features`: the head is the classifier's own."""
        return self.class_features(task)

    def class_order(self, task: Task) -> str | None:
        """Return "recorded" for the names in the configuration, "task" where there are none."""
        recorded = self.base.known_architecture().output_names
        return task.class_order or ("recorded" if recorded else "task")


def _outputs(checkpoint: Checkpoint, task: Task) -> list[int]:
    """Return the output of a classifier for each class of a task."""
    recorded = checkpoint.known_architecture().output_names
    if task.class_order is not None:
        recorded = [ordered(task, task.class_order)]
    if not recorded:
        return list(range(len(task.classes)))
    try:
        return positions(recorded, task, checkpoint.ref)[0]
    except TaskError as error:
        hint = "class_order= says in which order the outputs are: task, or a file of names"
        raise TaskError(error.fact, hint=hint) from None


@cache
def _say_order_is_taken(model: str, task: str) -> None:
    log.warning(
        "%s records no names of classes: its outputs are taken to be in the order of %s; "
        "class_order= says another order",
        model,
        task,
    )


def _for_learning(checkpoint: Checkpoint, task: Task) -> Checkpoint:
    """Return a classifier of a task's classes: its own head if it fits, else an untrained one."""
    architecture = checkpoint.known_architecture()
    module: Any = architecture.build()
    try:
        fits = module.num_classes == len(task.classes)
        outputs = _outputs(checkpoint, task) if fits else []
    except TaskError:
        fits = False  # as many classes, but others
    names = list(task.raw_classes or task.classes)
    if not fits:
        return _with_new_head(checkpoint, names)
    by_output = sorted(range(len(names)), key=lambda i: outputs[i])
    return checkpoint.with_form(
        checkpoint.form, architecture.with_classes([names[i] for i in by_output])
    )


def _with_new_head(checkpoint: Checkpoint, classes: Sequence[str]) -> Checkpoint:
    """Return a classifier with an untrained head for other classes."""
    architecture = checkpoint.known_architecture().with_classes(classes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        untrained = architecture.build()
    head: Any = untrained
    own = {id(parameter) for parameter in head.get_classifier().parameters()}
    new = {n for n, p in untrained.named_parameters(remove_duplicate=False) if id(p) in own}
    state = untrained.state_dict()
    kept = {
        name: checkpoint[name]
        for name, tensor in state.items()
        if name in checkpoint and name not in new and checkpoint.specs[name].shape == tensor.shape
    }
    source = MemorySource({**state, **kept}, f"{checkpoint.ref} with a new head")
    return Checkpoint(LinearForm.of(source), architecture)
