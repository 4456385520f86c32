"""`ImageModel`: a CLIP model or image classifier with all that is needed to run it."""

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
    """A model with an image and a text encoder, and all that is needed to run it.

    It keeps the preprocessed images of tasks between passes.

    Attributes:
        module: has ``encode_image`` and ``encode_text``, and ``visual``, the image encoder.
        preprocess: turns a PIL image into a normalised tensor of shape ``(3, height, width)``.
        tokenizer: turns texts into token ids.
        device: the device of the module.
        base: the checkpoint that the module was built from.
        trained_prefix: the prefix of the names of the tensors that are fine-tuned.
    """

    module: Any
    preprocess: Callable[[Any], torch.Tensor]
    tokenizer: Callable[[list[str]], torch.Tensor]
    device: torch.device
    base: Checkpoint
    _pixels: dict[tuple[Task, str], Pixels] = field(default_factory=dict)

    trained_prefix: ClassVar[str] = "visual."

    @classmethod
    def open(
        cls,
        model: CheckpointLike | ImageModel,
        device: str = "auto",
        *,
        learning: Task | None = None,
    ) -> ImageModel:
        """Build the model of a checkpoint whose architecture is known.

        Args:
            model: a CLIP model, or a classifier of timm.
            device: "auto", "cpu", "cuda", ...
            learning: the task that the model will be fine-tuned on. A classifier with a head for
                another number of classes gets a new head, the same in every process.

        Raises:
            CheckpointError: if the architecture is unknown, or the model has neither an image and
                a text encoder nor a head.
        """
        if isinstance(model, ImageModel):
            return model
        checkpoint = as_open_clip(open_checkpoint(model))
        torch_device = pick_device(device)
        if checkpoint.architecture is not None and checkpoint.architecture.is_classifier:
            return Classifier.build(checkpoint, torch_device, learning)
        module = checkpoint.model().to(torch_device)
        if not hasattr(module, "encode_image") or not hasattr(module, "encode_text"):
            raise CheckpointError(
                f"{checkpoint.ref} is a {type(module).__name__}, which has no image and text "
                "encoder: no zero-shot head can be built"
            )
        preprocess, tokenizer = checkpoint.preprocess(), checkpoint.tokenizer()
        return cls(module, preprocess, tokenizer, torch_device, checkpoint)

    def pixels(self, task: Task, split: str) -> Pixels:
        """Return the preprocessed images of a split, which are kept for later passes."""
        if (task, split) not in self._pixels:
            kept_bytes = sum(pixels.kept_bytes for pixels in self._pixels.values())
            self._pixels[task, split] = Pixels(
                task.load(split), self.preprocess, PIXEL_BUDGET - kept_bytes
            )
        return self._pixels[task, split]

    def forget(self, task: Task) -> None:
        """Free the preprocessed images of a task."""
        self._pixels = {key: pixels for key, pixels in self._pixels.items() if key[0] is not task}

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        """Return unit features of images, shape ``(n, dim)``, float32."""
        return F.normalize(self.module.encode_image(images.to(self.device)).float(), dim=-1)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Return the features that a linear probe is fitted to, shape ``(n, dim)``, float32."""
        return self.encode_image(images)

    def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return unit features of the tokens of texts, shape ``(n, dim)``, float32."""
        return F.normalize(self.module.encode_text(tokens.to(self.device)).float(), dim=-1)

    @torch.no_grad()
    def zero_shot_head(self, task: Task) -> torch.Tensor:
        """Return the frozen classifier of a task, shape ``(classes, dim)``.

        The logits of images are ``features @ head.T``. The row of a class is the mean of the unit
        features of its prompts, scaled to unit length, times ``exp(logit_scale)``. The head is
        cached on disk by a hash of the text encoder, the configuration and the prompts' tokens.

        Raises:
            TaskError: for a task without classes.
        """
        if not task.classes:
            raise TaskError(
                f"{task.name} has no classes, only captions", hint='evaluator="retrieval" scores it'
            )
        tokens = [self.tokenizer(list(texts)) for texts in task.prompts]
        path = cache_dir() / "heads" / f"{self._text_hash(tokens)}.safetensors"
        with suppress(OSError, SafetensorError, KeyError):
            cached: torch.Tensor = load_file(path)["head"]
            return cached.to(self.device)
        self.module.eval()
        rows = []
        for class_tokens in tqdm(tokens, desc=f"prompts of {task.name}", delay=1, leave=False):
            rows.append(F.normalize(self.encode_text(class_tokens).mean(0), dim=0))
        head: torch.Tensor = torch.stack(rows) * self.module.logit_scale.float().exp()
        content = save({"head": head.cpu()})
        with suppress(OSError, OutputError), atomic_output(path, overwrite=True) as output:
            output.write_bytes(content)  # without a cache, the head is computed again
        return head

    def _text_hash(self, tokens: list[torch.Tensor]) -> str:
        """Return a hash of all that a head depends on."""
        config = getattr(self.base.architecture, "config", None)
        digest = sha256(json.dumps(config, sort_keys=True, default=str).encode())
        tensors = {f"tokens {i}": class_tokens for i, class_tokens in enumerate(tokens)}
        for name, tensor in (*tensors.items(), *self.module.state_dict().items()):
            if not name.startswith("visual."):
                content = tensor.detach().reshape(-1).cpu().contiguous().view(torch.uint8).numpy()
                digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
                digest.update(content.data)
        return digest.hexdigest()


class Classifier(ImageModel):
    """A classifier of images with a head of its own, such as timm's; it has no text encoder."""

    trained_prefix: ClassVar[str] = ""

    @classmethod
    def build(
        cls, checkpoint: Checkpoint, device: torch.device, learning: Task | None
    ) -> Classifier:
        """Build a classifier, with a new head if its own doesn't fit the task to learn."""
        module: Any = checkpoint.model()
        if learning is not None and module.num_classes != len(learning.classes):
            checkpoint = _with_new_head(checkpoint, len(learning.classes))
            module = checkpoint.model()

        def no_tokenizer(texts: list[str]) -> torch.Tensor:
            raise CheckpointError(f"{checkpoint.ref} is a classifier, which takes no text")

        return cls(module.to(device), checkpoint.preprocess(), no_tokenizer, device, checkpoint)

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        """Return logits of images, shape ``(n, classes)``, float32."""
        logits: torch.Tensor = self.module(images.to(self.device)).float()
        return logits

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Return the input of the head, shape ``(n, dim)``, float32."""
        unpooled = self.module.forward_features(images.to(self.device))
        features: torch.Tensor = self.module.forward_head(unpooled, pre_logits=True).float()
        return features

    def zero_shot_head(self, task: Task) -> torch.Tensor:
        """Return the identity: `encode_image` returns the logits of the classifier's own head.

        Raises:
            TaskError: if the head is for another number of classes.
        """
        if self.module.num_classes != len(task.classes):
            raise TaskError(
                f"{self.base.ref} has a head for {self.module.num_classes} classes, "
                f"and {task.name} has {len(task.classes)}",
                hint="fine-tune the model on the task first, which gives it a new head",
            )
        return torch.eye(len(task.classes), device=self.device)


def _with_new_head(checkpoint: Checkpoint, classes: int) -> Checkpoint:
    """Return a classifier with an untrained head for another number of classes."""
    architecture = checkpoint.known_architecture().with_classes(classes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        untrained = architecture.build().state_dict()
    kept = {
        name: checkpoint[name]
        for name, tensor in untrained.items()
        if name in checkpoint and checkpoint.specs[name].shape == tensor.shape
    }
    source = MemorySource({**untrained, **kept}, f"{checkpoint.ref} with a new head")
    return Checkpoint(LinearForm.of(source), architecture)


def prompts_id(task: Task) -> str:
    """Return eight hex digits that identify the classes and templates of a task."""
    return sha256(json.dumps([task.classes, task.templates]).encode()).hexdigest()[:8]


class Pixels:
    """The images of a split as inputs of a model, prepared when they are first needed.

    Prepared images are kept as bytes if the last step of ``preprocess`` is `Normalize` and all of
    them fit into ``room_bytes``. Normalisation is repeated for each batch; the values are the same
    to the bit.

    Args:
        images: the images of the split.
        preprocess: turns a PIL image into a normalised tensor.
        room_bytes: the bytes that may be kept.

    Attributes:
        images: the images of the split.
        labels: class indices, shape ``(n,)``.
        kept_bytes: the bytes that are kept.
    """

    def __init__(
        self, images: Images, preprocess: Callable[[Any], torch.Tensor], room_bytes: int
    ) -> None:
        self.images = images
        self.labels = torch.from_numpy(np.asarray(images.labels))
        self.kept_bytes = 0
        self._preprocess = preprocess
        steps = preprocess.transforms if isinstance(preprocess, Compose) else [None]
        self._normalize = steps[-1] if isinstance(steps[-1], Normalize) else None
        self._resize = Compose(steps[:-1])
        self._kept: torch.Tensor | None = None
        self._ready = np.zeros(len(images), dtype=bool)
        if self._normalize is not None and len(images):
            first = self._as_bytes(0)
            if len(images) * first.numel() <= room_bytes:
                self._kept = first.new_empty((len(images), *first.shape))
                self.kept_bytes = self._kept.numel()

    def __len__(self) -> int:
        return len(self.images)

    def _as_bytes(self, index: int) -> torch.Tensor:
        """Return an image before normalisation, ``uint8``, of shape ``(3, height, width)``."""
        image: torch.Tensor = self._resize(self.images[index])
        return (image * 255).round().to(torch.uint8)

    def batch(self, indices: npt.NDArray[np.int64]) -> torch.Tensor:
        """Return normalised images of shape ``(n, 3, height, width)``."""
        if self._kept is None or self._normalize is None:
            return torch.stack([self._preprocess(self.images[int(i)]) for i in indices])
        for i in indices[~self._ready[indices]]:
            self._kept[i] = self._as_bytes(int(i))
            self._ready[i] = True
        kept = self._kept[torch.from_numpy(indices)]
        images: torch.Tensor = self._normalize(kept.float().div(255))
        return images
