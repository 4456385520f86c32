"""What can be fine-tuned: a model, its training data, and the loss of a batch."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from weightops.algebra.devices import pick_device
from weightops.algebra.linear_form import LinearForm
from weightops.checkpoints.checkpoint import Checkpoint
from weightops.checkpoints.formats.memory import MemorySource
from weightops.checkpoints.opening import CheckpointLike, open_checkpoint
from weightops.errors import OptionError, TaskError
from weightops.evaluation.image_model import ImageModel, Pixels, prompts_id
from weightops.evaluation.perplexity import token_blocks, token_loss
from weightops.tasks.task import Task
from weightops.training.fsdp import gather


class Learner(nn.Module):
    """A model with what it is to learn. A module, as that is what data parallelism takes; its parameters are those that learn.

    Attributes:
        base: the weights that it starts from.
        trained: the part of the model that learns.
        prefix: what the names of that part begin with in the whole.
        device: where the model is.
        name: of the task.
        source: where the data come from.
    """

    def __init__(
        self,
        base: Checkpoint,
        module: nn.Module,
        prefix: str,
        *,
        name: str,
        source: str,
        device: torch.device,
    ) -> None:
        super().__init__()
        self._whole = (module,)  # in a tuple, as what doesn't learn is no part of this module
        self.trained = module.get_submodule(prefix.removesuffix("."))
        self.base, self.prefix, self.name, self.source, self.device = (
            base,
            prefix,
            name,
            source,
            device,
        )
        self._ties = MemorySource(
            module.state_dict(), name
        ).ties  # which sharded tensors don't show

    @property
    def module(self) -> nn.Module:
        """The whole model."""
        return self._whole[0]

    def state(self) -> dict[str, torch.Tensor]:
        """The tensors of the part that learns, by their names in the whole; shared with it. Of tied ones, the first."""
        own = {f"{self.prefix}{name}": tensor for name, tensor in self.trained.state_dict().items()}
        return {name: tensor for name, tensor in own.items() if self._ties.get(name) not in own}

    def weights(self) -> dict[str, torch.Tensor]:
        """The whole model's tensors, copied to CPU; those that share memory still do. All processes of a node ask for them at once."""
        return copies(self.module.state_dict(), self._ties)

    def blank(self) -> dict[str, torch.Tensor]:
        """Zeros in the place of `weights`."""
        zeros = {
            name: torch.zeros(t.shape, dtype=t.dtype)
            for name, t in self.module.state_dict().items()
        }
        return copies(zeros, self._ties)

    def prepare(self) -> None:
        """Get what training needs, once it is sure that there will be any."""

    @property
    @abstractmethod
    def digest(self) -> str:
        """Eight hex digits that other data to learn from don't share."""

    @abstractmethod
    def __len__(self) -> int:
        """How many samples there are to learn from."""

    @abstractmethod
    def batch(self, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and labels, on CPU."""

    @abstractmethod
    def forward(self, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The mean loss of a batch."""

    def autocast(self) -> torch.autocast:
        """bfloat16 on CUDA, nothing on CPU."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")


class ImageLearner(Learner):
    """The image encoder of a CLIP model, under the frozen head of a task; or a classifier with its own head.

    Args:
        clip: the model.
        task: its training split is used.
    """

    _head: torch.Tensor
    _pixels: Pixels

    def __init__(self, clip: ImageModel, task: Task) -> None:
        super().__init__(
            clip.base,
            clip.module,
            clip.learns,
            name=task.name,
            source=task.source,
            device=clip.device,
        )
        self._clip, self._task = clip, task

    def prepare(self) -> None:
        """The head and the images.

        Raises:
            TaskError: if there are no training images.
        """
        self._head, self._pixels = (
            self._clip.zero_shot_head(self._task),
            self._clip.pixels(self._task, "train"),
        )
        if not len(self._pixels):
            raise TaskError(f"{self.name} has no training images")

    @property
    def digest(self) -> str:
        labels = np.asarray(self._task.load("train").labels)
        return _digest(prompts_id(self._task), labels.tobytes())

    def __len__(self) -> int:
        return len(self._pixels)

    def batch(self, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self._pixels.batch(indices.numpy()), self._pixels.labels[indices]

    def forward(self, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with self.autocast():
            features = self._clip.encode_image(inputs)
        return F.cross_entropy(features @ self._head.T, labels)


class ModuleLearner(Learner):
    """Any module, all of which learns: a timm classifier with its own head, a causal language model of transformers.

    Args:
        module: the model, as it starts.
        inputs: shape ``(n, ...)``.
        labels: shape ``(n, ...)``; for a language model, the tokens again.
        loss: gives the mean loss of a batch from the module, inputs and labels, as `classification` does for timm's models, and
            `weightops.evaluators.perplexity.token_loss` for language models.
        name: of the task.
        base: what the module is made from; by default its weights as they are.

    Raises:
        OptionError: if there are no samples, or other numbers of inputs and labels.

    >>> learner = ModuleLearner(nn.Linear(3, 2), torch.ones(8, 3), torch.zeros(8, dtype=torch.long), classification, name="zeros")
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
    ) -> None:
        if not len(inputs) or len(inputs) != len(labels):
            raise OptionError(f"{name} has {len(inputs)} inputs and {len(labels)} labels")
        device = next(module.parameters()).device
        own = (
            {}
            if base
            else copies(module.state_dict(), MemorySource(module.state_dict(), name).ties)
        )
        base = base or Checkpoint(LinearForm.of(MemorySource(own, type(module).__name__)))
        super().__init__(base, module, "", name=name, source="tensors", device=device)
        self._data, self._loss = (inputs, labels), loss

    @property
    def digest(self) -> str:
        return _digest(
            str(self._data[0].shape),
            self._data[1].cpu().contiguous().view(torch.uint8).numpy().tobytes(),
        )

    def __len__(self) -> int:
        return len(self._data[0])

    def batch(self, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        inputs, labels = self._data
        return inputs[indices], labels[indices]

    def forward(self, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with self.autocast():
            return self._loss(self.module, inputs, labels)


class TextLearner(ModuleLearner):
    """A causal language model of transformers, all of which learns from a text.

    Args:
        model: its folder or ref.
        text: a file of UTF-8.
        device: "auto", "cpu", "cuda", ...
        length: tokens a block; by default as many as the model takes, at most 1,024.

    Raises:
        CheckpointError: if it isn't a model of transformers with a tokenizer.
        TaskError: if the text has not even one block of tokens.
    """

    def __init__(
        self,
        model: CheckpointLike,
        text: str | Path,
        *,
        device: str = "auto",
        length: int | None = None,
    ) -> None:
        base = open_checkpoint(model)
        blocks = token_blocks(base, text, length)
        module = base.model().to(pick_device(device))
        super().__init__(module, blocks, blocks, token_loss, name=Path(text).name, base=base)


def _digest(text: str, content: bytes) -> str:
    return sha256(text.encode() + content).hexdigest()[:8]


def classification(module: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The cross-entropy of a classifier that gives logits, as timm's do."""
    return F.cross_entropy(module(images).float(), labels)


def copies(state: Mapping[str, torch.Tensor], ties: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """Tensors copied to CPU; those that share memory still do."""
    own = {name: gather(tensor).clone() for name, tensor in state.items() if name not in ties}
    return {name: own[ties.get(name, name)] for name in state}
