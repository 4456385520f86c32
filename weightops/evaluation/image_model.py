"""A CLIP model ready to run: module, preprocessing, tokenizer, device; zero-shot heads; pixels kept between passes."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torchvision.transforms import Compose, Normalize
from tqdm import tqdm

from weightops.algebra.devices import pick_device
from weightops.algebra.linear_form import LinearForm
from weightops.checkpoints.checkpoint import Checkpoint
from weightops.checkpoints.formats.memory import MemorySource
from weightops.checkpoints.matching import as_open_clip
from weightops.checkpoints.opening import CheckpointLike, open_checkpoint
from weightops.errors import CheckpointError, OutputError, TaskError
from weightops.support.atomic import atomic_output
from weightops.support.cache import cache_dir
from weightops.tasks.task import Images, Task

PIXEL_BUDGET = 4 << 30
"""Bytes of preprocessed images that a model keeps between passes."""


@dataclass(eq=False)
class ImageModel:
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
    _pixels: dict[tuple[Task, str], Pixels] = field(default_factory=dict)

    learns: ClassVar[str] = "visual."
    """What the names of the part that is fine-tuned begin with."""

    @classmethod
    def open(
        cls,
        model: CheckpointLike | ImageModel,
        device: str = "auto",
        *,
        learning: Task | None = None,
    ) -> ImageModel:
        """Build the model of a checkpoint that knows its architecture.

        Args:
            model: a CLIP model, or a classifier of timm.
            device: "auto", "cpu", "cuda", ...
            learning: what a classifier is to be fine-tuned on: if its head is for another number of classes, it gets a new one, the
                same whenever it is asked for.

        Raises:
            CheckpointError: if nothing says what model it is, or it has neither an image and text encoder nor a head.
        """
        if isinstance(model, ImageModel):
            return model
        checkpoint = as_open_clip(open_checkpoint(model))
        place = pick_device(device)
        if checkpoint.architecture is not None and checkpoint.architecture.is_classifier:
            return Classifier.of(checkpoint, place, learning)
        module = checkpoint.model().to(place)
        if not hasattr(module, "encode_image") or not hasattr(module, "encode_text"):
            raise CheckpointError(
                f"{checkpoint.ref} is a {type(module).__name__}, which has no image and text encoder: no zero-shot head can be made"
            )
        return cls(module, checkpoint.preprocess(), checkpoint.tokenizer(), place, checkpoint)

    def pixels(self, task: Task, split: str) -> Pixels:
        """The preprocessed images of a split; prepared once, kept for later passes."""
        if (task, split) not in self._pixels:
            spent = sum(pixels.budget for pixels in self._pixels.values())
            self._pixels[task, split] = Pixels(
                task.load(split), self.preprocess, PIXEL_BUDGET - spent
            )
        return self._pixels[task, split]

    def forget(self, task: Task) -> None:
        """Let go of a task's pixels."""
        self._pixels = {key: pixels for key, pixels in self._pixels.items() if key[0] is not task}

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        """Unit features of shape ``(n, dim)`` in float32."""
        return F.normalize(self.module.encode_image(images.to(self.device)).float(), dim=-1)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """What a linear probe is put on, shape ``(n, dim)`` in float32."""
        return self.encode_image(images)

    def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
        """Unit features of shape ``(n, dim)`` in float32, of what the tokenizer makes of texts."""
        return F.normalize(self.module.encode_text(tokens.to(self.device)).float(), dim=-1)

    @torch.no_grad()
    def zero_shot_head(self, task: Task) -> torch.Tensor:
        r"""The frozen classifier of a task, shape ``(classes, dim)``; logits are ``features @ head.T``.

        For each class the mean over templates of unit text embeddings, made unit again, times ``exp(logit_scale)``.
        Kept on disk under a hash of the text encoder's weights, the model's configuration and the prompts' tokens.

        Raises:
            TaskError: for a task without classes.
        """
        if not task.classes:
            raise TaskError(
                f"{task.name} has no classes, only captions: that is for `evaluate --evaluator retrieval`"
            )
        tokens = [self.tokenizer(list(texts)) for texts in task.prompts]
        path = cache_dir() / "heads" / f"{self._text_hash(tokens)}.safetensors"
        with suppress(OSError, SafetensorError, KeyError):
            kept: torch.Tensor = load_file(path)["head"]
            return kept.to(self.device)
        self.module.eval()
        rows = []
        for row in tqdm(tokens, desc=f"prompts of {task.name}", delay=1, leave=False):
            rows.append(F.normalize(self.encode_text(row).mean(0), dim=0))
        head: torch.Tensor = torch.stack(rows) * self.module.logit_scale.float().exp()
        with (
            suppress(OSError, OutputError),
            atomic_output(path, overwrite=True) as part,
        ):  # a cache may fail
            part.write_bytes(save({"head": head.cpu()}))
        return head

    def _text_hash(self, tokens: list[torch.Tensor]) -> str:
        config = getattr(self.base.architecture, "config", None)
        digest = sha256(json.dumps(config, sort_keys=True, default=str).encode())
        state: dict[str, torch.Tensor] = self.module.state_dict()
        for name, tensor in (
            *((f"tokens {i}", row) for i, row in enumerate(tokens)),
            *state.items(),
        ):
            if not name.startswith("visual."):
                digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
                digest.update(
                    tensor.detach().reshape(-1).cpu().contiguous().view(torch.uint8).numpy().data
                )
        return digest.hexdigest()


class Classifier(ImageModel):
    """A classifier of images with a head of its own, of timm; what it gives are logits."""

    learns: ClassVar[str] = ""

    @classmethod
    def of(cls, checkpoint: Checkpoint, place: torch.device, learning: Task | None) -> Classifier:
        """Build it; with a new head if the task has another number of classes than its own."""
        module: Any = checkpoint.model()
        if learning is not None and module.num_classes != len(learning.classes):
            architecture = checkpoint.known_architecture().with_classes(len(learning.classes))
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                fresh = architecture.build().state_dict()
            kept = {
                n: checkpoint[n]
                for n in fresh
                if n in checkpoint and checkpoint.specs[n].shape == fresh[n].shape
            }
            source = MemorySource({**fresh, **kept}, f"{checkpoint.ref} with a new head")
            checkpoint = Checkpoint(LinearForm.of(source), architecture)
            module = checkpoint.model()

        def no_tokenizer(texts: list[str]) -> torch.Tensor:
            raise CheckpointError(f"{checkpoint.ref} is a classifier, which takes no text")

        return cls(module.to(place), checkpoint.preprocess(), no_tokenizer, place, checkpoint)

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        """Logits of shape ``(n, classes)`` in float32."""
        logits: torch.Tensor = self.module(images.to(self.device)).float()
        return logits

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """What the head takes, shape ``(n, dim)`` in float32."""
        seen = self.module.forward_features(images.to(self.device))
        features: torch.Tensor = self.module.forward_head(seen, pre_logits=True).float()
        return features

    def zero_shot_head(self, task: Task) -> torch.Tensor:
        """The head is in the model: what comes after it changes nothing.

        Raises:
            TaskError: if it is for another number of classes.
        """
        if self.module.num_classes != len(task.classes):
            raise TaskError(
                f"{self.base.ref} has a head for {self.module.num_classes} classes, and {task.name} has {len(task.classes)}; "
                "fine-tune it on that task first (weightops finetune gives it a new head)"
            )
        return torch.eye(len(task.classes), device=self.device)


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

    def __init__(
        self, images: Images, preprocess: Callable[[Any], torch.Tensor], room: int
    ) -> None:
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
        images: torch.Tensor = self._normalize(
            self._kept[torch.from_numpy(indices)].float().div(255)
        )
        return images
