"""A CLIP model ready to run: module, preprocessing, tokenizer, device; zero-shot heads; pixels kept between passes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torchvision.transforms import Compose, Normalize
from tqdm import tqdm

from weightops.checkpoints.checkpoint import Checkpoint, CheckpointLike, open_checkpoint
from weightops.checkpoints.memory import from_dict
from weightops.errors import CheckpointError
from weightops.files import cache_dir, whole
from weightops.tasks.task import Images, Task

PIXEL_BUDGET = 4 << 30
"""Bytes of preprocessed images that a model keeps between passes."""


def pick_device(device: str) -> torch.device:
    """``auto`` is CUDA where there is one, else CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else torch.device(device)


@dataclass(eq=False)
class Clip:
    """A model with image and text encoders, and all that is needed to run it.

    Attributes:
        module: with ``encode_image`` and ``encode_text``, and ``visual`` as its image encoder.
        preprocess: PIL image -> normalised tensor of shape ``(3, height, width)``.
        tokenizer: texts -> token ids.
        device: where the module is.
        base: the checkpoint that it was made from.
    """

    module: Any
    preprocess: Callable[[Any], torch.Tensor]
    tokenizer: Callable[[list[str]], torch.Tensor]
    device: torch.device
    base: Checkpoint
    _pixels: dict[tuple[str, str], Pixels] = field(default_factory=dict)

    @classmethod
    def open(cls, model: CheckpointLike | Clip, device: str = "auto") -> Clip:
        """Build the model of a checkpoint that knows its architecture.

        Raises:
            CheckpointError: if it doesn't, or the model has no image and text encoder.
        """
        if isinstance(model, Clip):
            return model
        checkpoint = open_checkpoint(model)
        place = pick_device(device)
        module = checkpoint.model().to(place)
        if not hasattr(module, "encode_image") or not hasattr(module, "encode_text"):
            raise CheckpointError(
                f"{checkpoint.ref} is a {type(module).__name__}, which has no image and text encoder: no zero-shot head can be made"
            )
        return cls(module, checkpoint.preprocess(), checkpoint.tokenizer(), place, checkpoint)

    def pixels(self, task: Task, split: str) -> Pixels:
        """The preprocessed images of a split; prepared once, kept for later passes."""
        key = (task.name, split)
        if key not in self._pixels:
            spent = sum(pixels.budget for pixels in self._pixels.values())
            self._pixels[key] = Pixels(task.load(split), self.preprocess, PIXEL_BUDGET - spent)
        return self._pixels[key]

    def forget(self, task: Task, split: str) -> None:
        """Let go of the pixels of a split."""
        self._pixels.pop((task.name, split), None)

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        """Unit features of shape ``(n, dim)`` in float32."""
        return F.normalize(self.module.encode_image(images.to(self.device)).float(), dim=-1)

    @torch.no_grad()
    def zero_shot_head(self, task: Task) -> torch.Tensor:
        r"""The frozen classifier of a task, shape ``(classes, dim)``; logits are ``features @ head.T``.

        For each class the mean over templates of unit text embeddings, made unit again, times ``exp(logit_scale)``.
        Kept on disk under the fingerprint of the text encoder and the prompts.
        """
        path = cache_dir() / "heads" / f"{self._text_fingerprint()}-{prompts_id(task)}.safetensors"
        if path.is_file():
            kept: torch.Tensor = load_file(path)["head"]
            return kept.to(self.device)
        rows = []
        for name in tqdm(task.classes, desc=f"prompts of {task.name}", delay=1, leave=False):
            tokens = self.tokenizer([template.replace("{}", name) for template in task.templates]).to(self.device)
            rows.append(F.normalize(F.normalize(self.module.encode_text(tokens).float(), dim=-1).mean(0), dim=0))
        head: torch.Tensor = torch.stack(rows) * self.module.logit_scale.float().exp()
        with whole(path, overwrite=True) as part:
            save_file({"head": head.cpu()}, part)
        return head

    def _text_fingerprint(self) -> str:
        state: dict[str, torch.Tensor] = self.module.state_dict()
        return from_dict({name: tensor for name, tensor in state.items() if not name.startswith("visual.")}).fingerprint


def prompts_id(task: Task) -> str:
    """Eight hex digits that identify the classes and templates of a task."""
    return sha256(json.dumps([task.classes, task.templates]).encode()).hexdigest()[:8]


class Pixels:
    """Images of a split as the model's input, prepared when first asked for and kept as bytes where they fit.

    Args:
        images: the split.
        preprocess: its last step must be `Normalize` for the images to be kept: it is done anew for each batch, so
            that a byte a channel is kept, and the values are the same to the bit.
        room: bytes that may be kept.
    """

    def __init__(self, images: Images, preprocess: Callable[[Any], torch.Tensor], room: int) -> None:
        self.images = images
        self.labels = torch.from_numpy(np.asarray(images.labels))
        self._preprocess = preprocess
        steps = preprocess.transforms if isinstance(preprocess, Compose) else [None]
        self._normalize = steps[-1] if isinstance(steps[-1], Normalize) else None
        self._resize = Compose(steps[:-1])
        self._kept: torch.Tensor | None = None
        self._ready = np.zeros(len(images), dtype=bool)
        self.budget = 0
        if self._normalize is not None and len(images):
            first = self._bytes(0)
            if len(images) * first.numel() <= room:
                self._kept = first.new_empty((len(images), *first.shape))
                self.budget = self._kept.numel()

    def __len__(self) -> int:
        return len(self.images)

    def _bytes(self, index: int) -> torch.Tensor:
        image: torch.Tensor = self._resize(self.images[index])
        return (image * 255).round().to(torch.uint8)

    def batch(self, indices: npt.NDArray[np.int64]) -> torch.Tensor:
        """Normalised images of shape ``(n, 3, height, width)``."""
        if self._kept is None or self._normalize is None:
            return torch.stack([self._preprocess(self.images[int(i)]) for i in indices])
        for i in indices[~self._ready[indices]]:
            self._kept[i] = self._bytes(int(i))
            self._ready[i] = True
        images: torch.Tensor = self._normalize(self._kept[torch.from_numpy(indices)].float().div(255))
        return images
