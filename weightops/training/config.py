"""TODO."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from weightops.checkpoints.checkpoint import Checkpoint


@dataclass(frozen=True)
class TrainingConfig:
    """How to fine-tune; the defaults are the papers' for CLIP. A model may carry its own (see `config_for`).

    Attributes:
        steps: optimizer steps.
        batch_size: images a step, of all nodes together.
        lr: peak learning rate of AdamW, after a linear warm-up and before a cosine decay to 0.
        weight_decay: of AdamW.
        warmup: steps of warm-up; at most a tenth of all steps.
        max_grad_norm: gradients are scaled down to this norm.
        shift: move the images of a batch by up to this fraction of their side; 0 for no augmentation.
        ema: also keep the moving average of the weights with this decay a step, from 0 (for none) to 1.
        seed: of the order of images and of the augmentation.
        ascend: make the loss larger instead of smaller: the baseline that negation is compared with.
    """

    steps: int = 2000
    batch_size: int = 128
    lr: float = 1e-5
    weight_decay: float = 0.1
    warmup: int = 200
    max_grad_norm: float = 1.0
    shift: float = 0.0
    ema: float = 0.0
    seed: int = 0
    ascend: bool = False

    def learning_rate(self, step: int) -> float:
        """The learning rate at a step, counted from 0."""
        warmup = min(self.warmup, self.steps // 10)
        if step < warmup:
            return self.lr * (step + 1) / warmup
        return (
            self.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, self.steps - warmup)))
        )


def config_for(model: Checkpoint, **changes: Any) -> TrainingConfig:
    """The papers' recipe, changed by what the model's own configuration says (``weightops.finetune``) and then by ``changes``."""
    own = getattr(model.architecture, "config", {}).get("weightops", {}).get("finetune", {})
    return replace(
        TrainingConfig(),
        **{**own, **{name: value for name, value in changes.items() if value is not None}},
    )
