"""Learners: a model with its training data and the loss of a batch."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from weightops.algebra.linear_form import LinearForm
from weightops.algebra.precision import Precision, computed_in, pick_precision
from weightops.checkpoints.checkpoint import Checkpoint
from weightops.checkpoints.formats.memory import MemorySource
from weightops.checkpoints.opening import CheckpointLike
from weightops.errors import OptionError, TaskError
from weightops.evaluation.image_model import ImageModel, prompts_id
from weightops.evaluation.language_model import LanguageModel
from weightops.evaluation.linearized import LinearizedModel
from weightops.evaluation.perplexity import token_blocks, token_loss
from weightops.evaluation.pixels import Pixels
from weightops.support.lazy import F, nn, torch
from weightops.tasks.task import Task
from weightops.tasks.texts import TextTask
from weightops.training.fsdp import gather


class Learner(nn.Module):
    """A model with its training data and loss.

    A learner is a module whose parameters are those that learn, because data parallelism takes a
    module.

    Attributes:
        base: the weights that the model starts from.
        trained: the part of the model that learns.
        prefix: what the names of that part begin with in the whole model.
        name: name of the task.
        source: where the data come from.
        device: where the model is.
        precision: what the model is run in: "float32" or "bfloat16".
        linearized_at: the ref and fingerprint of the base that the model is linearised at, if so.
    """

    def __init__(
        self,
        base: Checkpoint,
        module: nn.Module,
        prefix: str,
        *,
        trained: nn.Module | None = None,
        name: str,
        source: str,
        device: torch.device,
        precision: Precision = "auto",
    ) -> None:
        super().__init__()
        self._whole_model = (module,)  # in a tuple: what doesn't learn is no part of this module
        self.trained = trained or module.get_submodule(prefix.removesuffix("."))
        self.base, self.prefix, self.device = base, prefix, device
        self.name, self.source = name, source
        self.precision = pick_precision(precision, device)
        self.linearized_at: Mapping[str, str] | None = None
        # Sharded tensors don't show which of them are tied.
        self._ties = MemorySource(module.state_dict(), name).ties

    @property
    def module(self) -> nn.Module:
        """The whole model."""
        return self._whole_model[0]

    def state(self) -> dict[str, torch.Tensor]:
        """Return the tensors of the part that learns, by their names in the whole model.

        They share memory with the module. Of tied tensors, only the first is returned.
        """
        own = {f"{self.prefix}{name}": tensor for name, tensor in self.trained.state_dict().items()}
        return {name: tensor for name, tensor in own.items() if self._ties.get(name) not in own}

    def weights(self) -> dict[str, torch.Tensor]:
        """Return the whole model's tensors, copied to CPU; tied tensors stay tied.

        All processes of a node must call this.
        """
        return copies(self.module.state_dict(), self._ties)

    def blank(self) -> dict[str, torch.Tensor]:
        """Return zeros in the form of `weights`."""
        zeros = {
            name: torch.zeros(t.shape, dtype=t.dtype)
            for name, t in self.module.state_dict().items()
        }
        return copies(zeros, self._ties)

    def prepare(self) -> None:
        """Load the data; called once, before the first step."""

    @property
    def reading(self) -> Mapping[str, Any]:
        """The data, as the record of a run says them."""
        return {"source": self.source}

    @property
    @abstractmethod
    def digest(self) -> str:
        """Eight hex digits that identify the data to learn from."""

    @abstractmethod
    def __len__(self) -> int:
        """Return how many samples there are to learn from."""

    @abstractmethod
    def batch(self, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the inputs and labels of samples, on CPU."""

    @abstractmethod
    def forward(self, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the mean loss of a batch."""

    def autocast(self) -> AbstractContextManager[None]:
        """Return a context that computes in the learner's precision."""
        return computed_in(self.precision, self.device)


class ImageLearner(Learner):
    """The image encoder of a CLIP model, under a task's frozen head; or a classifier with its own.

    Args:
        model: the model, whose module is trained in place.
        task: the task, whose training split is used.
    """

    _head: torch.Tensor
    _pixels: Pixels

    def __init__(self, model: ImageModel, task: Task) -> None:
        trained, prefix = model.trained
        super().__init__(
            model.base,
            model.module,
            prefix,
            trained=trained,
            name=task.name,
            source=task.source,
            device=model.device,
            precision=model.precision,  # type: ignore[arg-type]
        )
        self._model, self._task = model, task
        if isinstance(model, LinearizedModel):
            at = model.at
            self.linearized_at = at.record

    def prepare(self) -> None:
        """Build the head and load the images.

        Raises:
            TaskError: if there are no training images.
        """
        self._head = self._model.zero_shot_head(self._task)
        self._pixels = self._model.pixels(self._task, "train")
        if not len(self._pixels):
            raise TaskError(f"{self.name} has no training images")
        self._pixels.prepare()

    @property
    def reading(self) -> Mapping[str, Any]:
        return self._task.reading("train")

    @property
    def digest(self) -> str:
        labels = np.asarray(self._task.load("train").labels)
        order = self._task.class_order or ""
        return _digest(prompts_id(self._task) + order, labels.tobytes())

    def __len__(self) -> int:
        return len(self._pixels)

    def batch(self, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self._pixels.batch(indices.numpy()), self._pixels.labels[indices]

    def forward(self, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with self.autocast():
            features = self._model.encode_image(inputs)
        return F.cross_entropy(features @ self._head.T, labels)


class ModuleLearner(Learner):
    """Any module, all of which learns, such as a timm classifier or a causal language model.

    Args:
        module: the model to start from; it is trained in place.
        inputs: shape ``(n, ...)``.
        labels: shape ``(n, ...)``; for a language model, the tokens again.
        loss: function of the module, inputs and labels that returns the mean loss of a batch, such
            as `classification` for timm's models and `token_loss` for language models.
        name: name of the task.
        base: the checkpoint that the module was built from. Default: the module's weights.
        precision: float32, bfloat16, or auto: bfloat16 where the device computes in it.

    Raises:
        OptionError: if there are no samples, or the numbers of inputs and labels differ.

    >>> inputs, labels = torch.ones(8, 3), torch.zeros(8, dtype=torch.long)
    >>> learner = ModuleLearner(nn.Linear(3, 2), inputs, labels, classification, name="zeros")
    >>> learner(*learner.batch(torch.arange(4))).shape
    torch.Size([])
    """

    def __init__(
        self,
        module: nn.Module,
        inputs: torch.Tensor,
        labels: torch.Tensor,
        loss: Callable[[nn.Module, torch.Tensor, torch.Tensor], torch.Tensor],
        *,
        name: str,
        base: Checkpoint | None = None,
        precision: Precision = "auto",
    ) -> None:
        if not len(inputs) or len(inputs) != len(labels):
            raise OptionError(f"{name} has {len(inputs)} inputs and {len(labels)} labels")
        device = next(module.parameters()).device
        if base is None:
            state = module.state_dict()
            start = copies(state, MemorySource(state, name).ties)
            base = Checkpoint(LinearForm.of(MemorySource(start, type(module).__name__)))
        super().__init__(
            base, module, "", name=name, source="tensors", device=device, precision=precision
        )
        self._inputs, self._labels, self._loss = inputs, labels, loss

    @property
    def digest(self) -> str:
        labels = self._labels.cpu().contiguous().view(torch.uint8)
        return _digest(str(self._inputs.shape), labels.numpy().tobytes())

    def __len__(self) -> int:
        return len(self._inputs)

    def batch(self, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self._inputs[indices], self._labels[indices]

    def forward(self, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with self.autocast():
            return self._loss(self.module, inputs, labels)


class TextLearner(ModuleLearner):
    """A causal language model of transformers, all of which learns from a text.

    Args:
        model: the folder or ref of the model, or a `LanguageModel`, which is trained in place.
        text: a UTF-8 file, all of which is learned, or a task, whose training split is.
        device: "auto", "cpu", "cuda", "cuda:1", ...
        length: tokens per block. Default: as many as the model takes, at most 1,024.
        precision: as for `ModuleLearner`.

    Raises:
        CheckpointError: if the model isn't a causal language model of transformers.
        TaskError: if the text is shorter than one block.
    """

    def __init__(
        self,
        model: CheckpointLike | LanguageModel,
        text: str | Path | TextTask,
        *,
        device: str = "auto",
        length: int | None = None,
        precision: Precision = "auto",
    ) -> None:
        opened = LanguageModel.open(model, device, precision=precision)
        base = opened.base
        if isinstance(text, TextTask):
            blocks, name = opened.blocks(text, "train"), text.name
        else:
            blocks, name = token_blocks(base, text, length), Path(text).name
        super().__init__(
            opened.module,
            blocks,
            blocks,
            token_loss,
            name=name,
            base=base,
            precision=opened.precision,  # type: ignore[arg-type]
        )
        self.source = text.source if isinstance(text, TextTask) else f"the text {name}"


def _digest(text: str, content: bytes) -> str:
    return sha256(text.encode() + content).hexdigest()[:8]


def classification(module: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the cross-entropy of a classifier that returns logits, as timm's models do."""
    return F.cross_entropy(module(images).float(), labels)


def copies(state: Mapping[str, torch.Tensor], ties: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """Return tensors copied to CPU; tied tensors stay tied."""
    own = {name: gather(tensor).clone() for name, tensor in state.items() if name not in ties}
    return {name: own[ties.get(name, name)] for name in state}
