"""`ImageModel`: a CLIP model or image classifier with all that is needed to run it."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache
from hashlib import sha256
from typing import Any

import numpy as np
from safetensors import SafetensorError

from weightops.algebra.devices import pick_device
from weightops.algebra.precision import Precision, computed_in, pick_precision
from weightops.checkpoints.checkpoint import Checkpoint
from weightops.checkpoints.libraries.dual_encoders import DUAL_ENCODERS, is_dual_encoder
from weightops.checkpoints.linearized import linearized_at
from weightops.checkpoints.matching import as_open_clip
from weightops.checkpoints.opening import CheckpointLike, open_checkpoint
from weightops.errors import CheckpointError, NonfiniteError, OutputError, TaskError
from weightops.evaluation.pixels import PIXEL_BUDGET, Pixels
from weightops.support.atomic import atomic_output
from weightops.support.cache import cache_dir
from weightops.support.lazy import F, nn, torch, without_gradients
from weightops.support.progress import tracked
from weightops.support.registry import unknown
from weightops.tasks.task import SPLITS, Images, Task
from weightops.tasks.texts import TextTask

log = logging.getLogger("weightops")

_TEXTS_AT_A_TIME = 256


@dataclass(eq=False)
class ImageModel:
    """A model with an image and a text encoder, and all that is needed to run it.

    It keeps the preprocessed images of tasks, and the tokens of their prompts, between passes.

    Attributes:
        module: has ``encode_image`` and ``encode_text``, and ``visual``, the image encoder.
        preprocess: turns a PIL image into a normalised tensor of shape ``(3, height, width)``.
        tokenizer: turns texts into token ids.
        device: the device of the module.
        base: the checkpoint that the module was built from.
        precision: what images, and texts but those of heads, are encoded in.
    """

    module: Any
    preprocess: Callable[[Any], torch.Tensor]
    tokenizer: Callable[[list[str]], torch.Tensor]
    device: torch.device
    base: Checkpoint
    precision: str = "float32"
    _pixels: dict[tuple[Task, str], Pixels] = field(default_factory=dict)
    _tokens: dict[Task, list[torch.Tensor]] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.base.ref!r}, {self.device}, {self.precision})"

    @classmethod
    def open(
        cls,
        model: CheckpointLike | ImageModel,
        device: str = "auto",
        *,
        learning: Task | None = None,
        precision: Precision = "auto",
    ) -> ImageModel:
        """Build the model of a checkpoint whose architecture is known.

        Args:
            model: a CLIP model, or a classifier of timm.
            device: "auto", "cpu", "cuda", ...
            learning: the task to learn; a classifier of others gets a head, alike in all processes.
            precision: auto is bfloat16 where the device computes in it, else float32; for a
                classifier it is float32, as nothing bounds how its head enlarges a rounding.

        Raises:
            CheckpointError: if the architecture is unknown, or the model has neither an image and
                a text encoder nor a head.
        """
        if isinstance(model, ImageModel):
            return model if precision == "auto" else model.in_precision(precision)
        checkpoint = as_open_clip(open_checkpoint(model))
        torch_device = pick_device(device)
        if linearized_at(checkpoint.form) is not None:
            from weightops.evaluation import linearized

            return linearized.open_linearized(checkpoint, device).in_precision(precision)
        used = pick_precision(precision, torch_device)
        if is_dual_encoder(checkpoint.architecture):
            from weightops.evaluation.dual_encoder import DualEncoder

            return DualEncoder.build(checkpoint, torch_device, used)
        if checkpoint.architecture is not None and checkpoint.architecture.is_classifier:
            from weightops.evaluation.classifier import Classifier

            used = "float32" if precision == "auto" else used
            return Classifier.build(checkpoint, torch_device, used, learning)
        module = checkpoint.model().to(torch_device)
        if not hasattr(module, "encode_image") or not hasattr(module, "encode_text"):
            raise CheckpointError(
                f"{checkpoint.ref} is a {type(module).__name__}, whose image and text encoders "
                "aren't known: no zero-shot head can be built",
                hint="CLIP models of open_clip have one, and those of transformers with a "
                f"model_type of clip, {', '.join(sorted(DUAL_ENCODERS))}; a language model takes "
                "the paths of texts as tasks",
            )
        preprocess, tokenizer = checkpoint.preprocess(), checkpoint.tokenizer()
        return cls(module, preprocess, tokenizer, torch_device, checkpoint, used)

    def in_precision(self, precision: Precision) -> ImageModel:
        """Return the same model, images and all, run in another precision."""
        return replace(self, precision=pick_precision(precision, self.device))

    @property
    def trained(self) -> tuple[nn.Module, str]:
        """The part that is fine-tuned, and what its names begin with in the whole module."""
        return self.module.visual, "visual."

    def pixels(self, task: Task, split: str) -> Pixels:
        """Return the preprocessed images of a split, which are kept for later passes."""
        if split not in SPLITS:
            raise unknown("split", split, SPLITS)
        if (task, split) not in self._pixels:
            kept_bytes = sum(pixels.kept_bytes for pixels in self._pixels.values())
            images = task.load(split)
            _check_labels(images, task, split)
            self._pixels[task, split] = Pixels(
                images,
                self.preprocess,
                PIXEL_BUDGET - kept_bytes,
                f"{task.name} {split}",
                self.device,
            )
        return self._pixels[task, split]

    def forget(self, task: Task) -> None:
        """Free the preprocessed images and the tokens of a task."""
        self._tokens.pop(task, None)
        self._pixels = {key: pixels for key, pixels in self._pixels.items() if key[0] is not task}

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        """Return unit features of images, shape ``(n, dim)``, float32."""
        with computed_in(self.precision, self.device):
            features = self.module.encode_image(images.to(self.device))
        return F.normalize(features.float(), dim=-1)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Return the features that a linear probe is fitted to, shape ``(n, dim)``, float32."""
        return self.encode_image(images)

    def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return unit features of the tokens of texts, shape ``(n, dim)``, float32."""
        with computed_in(self.precision, self.device):
            features = self.module.encode_text(tokens.to(self.device))
        return F.normalize(features.float(), dim=-1)

    @without_gradients
    def class_features(self, task: Task) -> torch.Tensor:
        """Return unit features of a task's classes, shape ``(classes, dim)``, float32.

        The row of a class is the mean of the unit features of its prompts, scaled to unit length.
        Heads are made in float32, whatever the model's precision: they are made once.
        The rows are cached on disk by a hash of the text encoder, the configuration and the
        prompts' tokens.

        Raises:
            TaskError: for a task without classes.
            NonfiniteError: if the text encoder gives NaN or infinities.
        """
        from safetensors.torch import load_file, save  # imports torch

        if task.class_order is not None:
            _say_order_is_unused(self.base.ref, task.name)
        if isinstance(task, TextTask):
            raise TaskError(
                f"{task.name} is a text, and {self.base.ref} a model of images",
                hint="language models take texts",
            )
        if not task.classes:
            raise TaskError(
                f"{task.name} has no classes, only captions", hint='evaluator="retrieval" scores it'
            )
        if task not in self._tokens:
            self._tokens[task] = [self.tokenizer(list(texts)) for texts in task.prompts]
            _warn_of_equal_texts(self._tokens[task], task)
        tokens = self._tokens[task]
        path = cache_dir() / "heads" / f"{self._text_hash(tokens)}.safetensors"
        with suppress(OSError, SafetensorError, KeyError):
            cached: torch.Tensor = load_file(path)["classes"]
            return cached.to(self.device)
        self.module.eval()
        exact = self.in_precision("float32")
        rows: list[torch.Tensor] = []
        together = max(1, _TEXTS_AT_A_TIME // max(map(len, tokens)))
        starts = range(0, len(tokens), together)
        for start in tracked(starts, f"prompts of {task.name}"):
            group = tokens[start : start + together]
            encoded = exact.encode_text(torch.cat(group))
            parts = torch.split(encoded, [len(texts) for texts in group])
            rows += [F.normalize(part.mean(0), dim=0) for part in parts]
        features = torch.stack(rows)
        check_finite(~features.isfinite().all(1).cpu(), f"the text features of {task.name}")
        content = save({"classes": features.cpu()})
        with suppress(OSError, OutputError), atomic_output(path, overwrite=True) as output:
            output.write_bytes(content)  # without a cache, they are computed again
        return features

    def zero_shot_head(self, task: Task) -> torch.Tensor:
        """Return the frozen classifier of a task, shape ``(classes, dim)``.

        The logits of images are ``features @ head.T``. The head is `class_features` times
        ``exp(logit_scale)``, which changes the loss and no accuracy.

        Raises:
            TaskError: for a task without classes.
            NonfiniteError: if the head has NaN or infinities.
        """
        scale = self.module.logit_scale.detach().float().exp()
        head: torch.Tensor = self.class_features(task) * scale
        if not head.isfinite().all():
            raise NonfiniteError(
                f"exp(logit_scale) of {self.base.ref} is {float(scale):g}, so its loss isn't finite"
            )
        return head

    def class_order(self, task: Task) -> str | None:
        """Return what the order of the outputs is taken from; None if the head is made of text."""
        return None

    def _text_hash(self, tokens: list[torch.Tensor]) -> str:
        """Return a hash of all that a head depends on."""
        config = getattr(self.base.architecture, "config", None)
        digest = sha256(json.dumps(config, sort_keys=True, default=str).encode())
        tensors = {f"tokens {i}": class_tokens for i, class_tokens in enumerate(tokens)}
        part, prefix = self.trained
        of_images = {f"{prefix}{name}" for name in part.state_dict()}
        for name, tensor in (*tensors.items(), *self.module.state_dict().items()):
            if name not in of_images:
                content = tensor.detach().reshape(-1).cpu().contiguous().view(torch.uint8).numpy()
                digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
                digest.update(content.data)
        return digest.hexdigest()


def _check_labels(images: Images, task: Task, split: str) -> None:
    """Refuse labels that aren't one index of a class for each image.

    Raises:
        TaskError: naming the first such label.
    """
    labels, classes = np.asarray(images.labels), max(len(task.classes), 1)  # captions have label 0
    if labels.shape != (len(images),) or not np.issubdtype(labels.dtype, np.integer):
        raise TaskError(
            f"{task.name} {split} has labels of dtype {labels.dtype} and shape {labels.shape} for "
            f"{len(images)} images",
            hint="give an array with the index of a class for each image",
        )
    bad = labels[(labels < 0) | (labels >= classes)]
    if len(bad):
        raise TaskError(
            f"{task.name} {split} has {len(bad)} labels such as {bad[0]}, which are the index of "
            f"none of its {len(task.classes)} classes",
            hint="the first class has the index 0",
        )


def _warn_of_equal_texts(tokens: Sequence[torch.Tensor], task: Task) -> None:
    """Warn of classes that the tokenizer can't tell apart, of which one is never guessed."""
    first: dict[bytes, str] = {}
    for texts, name in zip(tokens, task.classes, strict=True):
        other = first.setdefault(texts.cpu().numpy().tobytes(), name)
        if other != name:
            _say_texts_are_equal(task.name, other, name)


@cache
def _say_texts_are_equal(task: str, first: str, second: str) -> None:
    log.warning(
        "the prompts of %s are equal for the classes %r and %r: a model can't tell them apart",
        task,
        first,
        second,
    )


@cache
def _say_order_is_unused(model: str, task: str) -> None:
    log.warning("%s makes its head from the class names of %s: no order is needed", model, task)


def check_finite(bad: torch.Tensor, what: str) -> None:
    """Refuse values that aren't finite: they have no order.

    Args:
        bad: whether each row has NaN or infinities, shape ``(n,)``, boolean.
        what: what the rows are.

    Raises:
        NonfiniteError: naming how many rows are bad.
    """
    count = int(bad.sum())
    if count:
        raise NonfiniteError(
            f"{what} have NaN or infinities in {count} of {len(bad)} rows",
            hint="the weights are damaged, or extrapolated too far: `weightops inspect` shows them",
        )


def prompts_id(task: Task) -> str:
    """Return eight hex digits that identify the classes and templates of a task."""
    return sha256(json.dumps([task.classes, task.templates]).encode()).hexdigest()[:8]
