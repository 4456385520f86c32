"""The recipe of a fine-tuning run."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Annotated

from weightops.checkpoints.opening import CheckpointLike, open_checkpoint
from weightops.support.arguments import check_arguments
from weightops.support.ranges import Range


@dataclass(frozen=True)
class TrainingConfig:
    """The recipe of a fine-tuning run; the defaults are the papers' for CLIP (arXiv 2212.04089).

    A model may carry its own recipe, see `config_for`.

    Attributes:
        steps: optimizer steps.
        batch_size: samples per step, of all nodes together.
        lr: peak learning rate of AdamW, after a linear warm-up and before a cosine decay to 0.
        weight_decay: weight decay of AdamW.
        warmup: steps of warm-up; at most a tenth of all steps.
        max_grad_norm: the norm that gradients with a larger one are scaled down to.
        shift: augmentation: each image is moved by up to this fraction of its side; 0 for none.
        ema: decay per step of a moving average of the weights that is kept as well; 0 for none.
        seed: seed of the order of samples, of the augmentation and of randomness in the model.
        ascend: raise the loss instead of lowering it: the baseline that negation is compared with.
        linearized: train the model that is linear in its weights, the tangent at the start (arXiv
            2305.12827); for Vision Transformers of CLIP.

    Raises:
        OptionError: if a number is outside of its range.
    """

    steps: Annotated[int, Range(min=1)] = 2000
    batch_size: Annotated[int, Range(min=1)] = 128
    lr: Annotated[float, Range(min=0, min_open=True)] = 1e-5
    weight_decay: Annotated[float, Range(min=0)] = 0.1
    warmup: Annotated[int, Range(min=0)] = 200
    max_grad_norm: Annotated[float, Range(min=0, min_open=True)] = 1.0
    shift: Annotated[float, Range(min=0, max=1, max_open=True)] = 0.0
    ema: Annotated[float, Range(min=0, max=1, max_open=True)] = 0.0
    seed: Annotated[int, Range(min=0)] = 0
    ascend: bool = False
    linearized: bool = False

    def __post_init__(self) -> None:
        check_arguments(type(self), **vars(self))

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        warmup = min(self.warmup, self.steps // 10)
        if step < warmup:
            return self.lr * (step + 1) / warmup
        return (
            self.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, self.steps - warmup)))
        )


def config_for(
    model: CheckpointLike,
    *,
    steps: int | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    weight_decay: float | None = None,
    warmup: int | None = None,
    max_grad_norm: float | None = None,
    shift: float | None = None,
    ema: float | None = None,
    seed: int | None = None,
    ascend: bool | None = None,
    linearized: bool | None = None,
) -> TrainingConfig:
    """Return the recipe to fine-tune a model with.

    A value that isn't given is the model's own, else the papers' (see `TrainingConfig`). A model's
    own recipe is in its configuration, under ``weightops.finetune``.

    Args:
        model: the model to fine-tune: anything that `open_checkpoint` takes.
        steps: steps of fine-tuning. Default: the model's own, else the papers'.
        batch_size: samples per step, of all nodes together. Default: the model's own, else the
            papers'.
        lr: peak learning rate of AdamW. Default: the model's own, else the papers'.
        weight_decay: weight decay of AdamW.
        warmup: steps of linear warm-up; at most a tenth of all steps.
        max_grad_norm: the norm that gradients with a larger one are scaled down to.
        shift: move each image by up to this fraction of its side.
        ema: also keep the moving average of the weights, with this decay per step.
        seed: seed of everything random.
        ascend: raise the loss instead of lowering it.
        linearized: train the model that is linear in its weights, the tangent at the start (arXiv
            2305.12827); for Vision Transformers of CLIP.

    Raises:
        OptionError: if a number is outside of its range.

    >>> config_for("embedded", lr=0.01).lr
    0.01
    """
    given = {
        "steps": steps,
        "batch_size": batch_size,
        "lr": lr,
        "weight_decay": weight_decay,
        "warmup": warmup,
        "max_grad_norm": max_grad_norm,
        "shift": shift,
        "ema": ema,
        "seed": seed,
        "ascend": ascend,
        "linearized": linearized,
    }
    changes = {name: value for name, value in given.items() if value is not None}
    architecture = open_checkpoint(model).architecture
    own = getattr(architecture, "config", {}).get("weightops", {}).get("finetune", {})
    return replace(TrainingConfig(), **{**own, **changes})
