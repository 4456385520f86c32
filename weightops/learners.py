"""What can be fine-tuned: a model, its training data, and the loss of a batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from weightops.errors import TaskError
from weightops.evaluators.clip import Clip
from weightops.tasks.task import Task


class ClipLearner(nn.Module):
    """The image encoder of a CLIP model, under the frozen head of a task. A module, as that is what data parallelism takes.

    Args:
        clip: the model.
        task: its training split is used.

    Raises:
        TaskError: if there are no training images.
    """

    def __init__(self, clip: Clip, task: Task) -> None:
        super().__init__()
        self.trained: nn.Module = clip.module.visual
        self.device = clip.device
        self.title = f"fine-tuning on {task.name}"
        self._head, self._pixels, self._clip = clip.zero_shot_head(task), clip.pixels(task, "train"), clip
        if not len(self._pixels):
            raise TaskError(f"{task.name} has no training images")

    def __len__(self) -> int:
        return len(self._pixels)

    @property
    def module(self) -> nn.Module:
        """The whole model; only `trained`, a part of it, learns."""
        module: nn.Module = self._clip.module
        return module

    def state(self) -> dict[str, torch.Tensor]:
        """The tensors of that part, by their names in the whole; shared with it."""
        return {f"visual.{name}": tensor for name, tensor in self.trained.state_dict().items()}

    def batch(self, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Images and labels, on CPU."""
        return self._pixels.batch(indices.numpy()), self._pixels.labels[indices]

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The mean loss; on CUDA the encoder runs in bfloat16."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            features = self._clip.encode_image(images)
        return F.cross_entropy(features @ self._head.T, labels)
