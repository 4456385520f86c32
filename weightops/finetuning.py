"""Fine-tune an image encoder under a frozen zero-shot head (arXiv 2208.05592, 2212.04089)."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from tqdm import tqdm

from weightops.checkpoints.checkpoint import Checkpoint, CheckpointLike, open_checkpoint
from weightops.checkpoints.memory import MemorySource
from weightops.errors import CheckpointError, OutputError
from weightops.evaluators.clip import Clip
from weightops.evaluators.zero_shot import as_tasks
from weightops.expression import LinearForm
from weightops.files import check_free, whole
from weightops.tasks.task import Task

log = logging.getLogger("weightops")

STATE, LOG, WEIGHTS = "training.pt", "log.jsonl", "finetuned.safetensors"


@dataclass(frozen=True)
class TrainingConfig:
    """How to fine-tune; the defaults are the papers' for CLIP. A model may carry its own (see `config_for`).

    Attributes:
        steps: optimizer steps.
        batch_size: images a step.
        lr: peak learning rate of AdamW, after a linear warm-up and before a cosine decay to 0.
        weight_decay: of AdamW.
        warmup: steps of warm-up.
        max_grad_norm: gradients are scaled down to this norm.
        shift: move the images of a batch by up to this fraction of their side; 0 for no augmentation.
        seed: of the order of images and of the augmentation.
    """

    steps: int = 2000
    batch_size: int = 128
    lr: float = 1e-5
    weight_decay: float = 0.1
    warmup: int = 200
    max_grad_norm: float = 1.0
    shift: float = 0.0
    seed: int = 0

    def learning_rate(self, step: int) -> float:
        """The learning rate at a step, counted from 0."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        return self.lr * 0.5 * (1 + math.cos(math.pi * (step - self.warmup) / max(1, self.steps - self.warmup)))


def config_for(model: Checkpoint, **changes: Any) -> TrainingConfig:
    """The papers' recipe, changed by what the model's own configuration says (``weightops.finetune``) and then by ``changes``."""
    own = getattr(model.architecture, "config", {}).get("weightops", {}).get("finetune", {})
    return replace(TrainingConfig(), **{**own, **{name: value for name, value in changes.items() if value is not None}})


def finetune(
    model: CheckpointLike | Clip, task: str | Task, config: TrainingConfig | None = None, *, out: str | Path | None = None,
    checkpoint_every: int = 500, resume: bool = False, overwrite: bool = False, device: str = "auto",
) -> Checkpoint:  # fmt: skip
    """Fine-tune the image encoder on a task; the text encoder, and so the head, stays as it is.

    Args:
        model: what to start from: anything with a known architecture, or a `Clip`, whose module is then trained in place.
        task: a name or a `Task`; its training split is used and no other.
        config: how; by default `config_for` the model.
        out: a folder for ``finetuned.safetensors`` and ``log.jsonl``, and for the state while it runs.
        checkpoint_every: steps between states that a killed run can be resumed from.
        resume: go on from the state in ``out``; on CPU the weights end the same to the bit.
        overwrite: replace a finished run in ``out``.
        device: "auto", "cpu", "cuda", ...

    Returns:
        The fine-tuned weights, in memory, or from ``out`` where it is given.

    Raises:
        OutputError: if ``out`` holds a finished run and neither ``resume`` nor ``overwrite`` is set.
        CheckpointError: if a state is of another run.
    """
    clip = Clip.open(model, device)
    [task] = as_tasks(task)
    config = config or config_for(clip.base)
    folder = Path(out) if out is not None else None
    if folder is not None:
        if resume and (folder / WEIGHTS).is_file():
            return _finished(folder, clip)
        check_free(folder / WEIGHTS, overwrite=overwrite)
        folder.mkdir(parents=True, exist_ok=True)
        if not resume:
            (folder / STATE).unlink(missing_ok=True)
    identity = {
        "config": asdict(config),
        "base": clip.base.form.sources[0].fingerprint,
        "task": task.name,
        "source": task.source,
    }
    state = _train(clip, task, config, folder, identity, checkpoint_every)
    result = Checkpoint(
        LinearForm.of(MemorySource(state, f"{clip.base.ref} fine-tuned on {task.name}")), clip.base.architecture
    )
    if folder is not None:
        result.save(folder / WEIGHTS, overwrite=True, on_nonfinite="error")
        (folder / STATE).unlink(missing_ok=True)
        return _finished(folder, clip)
    return result


def _finished(folder: Path, clip: Clip) -> Checkpoint:
    return Checkpoint(open_checkpoint(folder / WEIGHTS).form, clip.base.architecture)


def _train(
    clip: Clip, task: Task, config: TrainingConfig, folder: Path | None, identity: Mapping[str, Any], every: int
) -> dict[str, torch.Tensor]:
    """The loop; the module's whole state at its end, on CPU."""
    head = clip.zero_shot_head(task)
    pixels = clip.pixels(task, "train")
    if not len(pixels):
        raise OutputError(f"{task.name} has no training images")
    visual = clip.module.visual
    parameters = [p for p in visual.parameters() if p.is_floating_point()]
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay)
    first = _restore(folder, identity, visual, optimizer)
    mixed = clip.device.type == "cuda"
    started, lines = time.monotonic(), []
    with (
        _training(clip),
        tqdm(
            total=config.steps, initial=first, desc=f"fine-tuning on {task.name}", unit="step", delay=1, leave=False
        ) as bar,
    ):
        for step in range(first, config.steps):
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate(step)
            indices = batch_indices(len(pixels), config.batch_size, step, config.seed)
            images = _shifted(pixels.batch(indices), config, step).to(clip.device)
            with torch.autocast(clip.device.type, torch.bfloat16, enabled=mixed):
                features = clip.encode_image(images)
            loss = F.cross_entropy(features @ head.T, pixels.labels[indices].to(clip.device))
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
            optimizer.step()
            bar.update()
            if step % 10 == 0 or step + 1 == config.steps:
                bar.set_postfix(loss=f"{loss.item():.3f}")
                lines.append(
                    {
                        "step": step + 1,
                        "loss": loss.item(),
                        "lr": config.learning_rate(step),
                        "seconds": time.monotonic() - started,
                    }
                )
            if folder is not None and (step + 1) % every == 0 and step + 1 < config.steps:
                _keep(folder, identity, visual, optimizer, step + 1, lines)
                lines = []
    if folder is not None:
        _log(folder, lines)
    return {name: tensor.detach().cpu().clone() for name, tensor in clip.module.state_dict().items()}


@contextmanager
def _training(clip: Clip) -> Iterator[None]:
    """Only the image encoder learns; the random numbers of the caller aren't touched."""
    clip.module.requires_grad_(False)
    clip.module.visual.requires_grad_(True)
    clip.module.train()
    try:
        with torch.random.fork_rng(devices=[clip.device] if clip.device.type == "cuda" else []):
            yield
    finally:
        clip.module.eval()


def batch_indices(images: int, batch_size: int, step: int, seed: int) -> npt.NDArray[np.int64]:
    """The images of a step: a new order each epoch, a function of (seed, step) alone, so that a run can be resumed anywhere."""
    place = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs = {
        int(epoch): np.random.default_rng([seed, int(epoch)]).permutation(images)
        for epoch in np.unique(place // images)
    }
    return np.array([epochs[int(p // images)][p % images] for p in place], dtype=np.int64)


def _shifted(images: torch.Tensor, config: TrainingConfig, step: int) -> torch.Tensor:
    """The images of a batch, each moved by its own whole number of pixels; the border is repeated."""
    torch.manual_seed(
        int(np.random.default_rng([config.seed, step]).integers(1 << 62))
    )  # for whatever is random in the model, too
    height, width = images.shape[-2:]
    reach = round(config.shift * min(height, width))
    if not reach:
        return images
    padded = F.pad(images, (reach,) * 4, mode="replicate")
    offsets = torch.randint(0, 2 * reach + 1, (len(images), 2)).tolist()
    return torch.stack([image[:, y : y + height, x : x + width] for image, (y, x) in zip(padded, offsets, strict=True)])


def _keep(
    folder: Path,
    identity: Mapping[str, Any],
    visual: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    step: int,
    lines: list[dict[str, float]],
) -> None:
    """Write the state to go on from, whole or not at all."""
    _log(folder, lines)
    with whole(folder / STATE, overwrite=True) as part:
        torch.save(
            {
                "identity": json.dumps(identity),
                "step": step,
                "visual": visual.state_dict(),
                "optimizer": optimizer.state_dict(),
            },
            part,
        )


def _log(folder: Path, lines: list[dict[str, float]]) -> None:
    with open(folder / LOG, "a", encoding="utf-8") as stream:
        stream.writelines(json.dumps(line) + "\n" for line in lines)


def _restore(
    folder: Path | None, identity: Mapping[str, Any], visual: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> int:
    """Load the state in a folder, if there is one; the step to go on from."""
    if folder is None or not (folder / STATE).is_file():
        if folder is not None:
            (folder / LOG).unlink(missing_ok=True)
        return 0
    state = torch.load(folder / STATE, map_location="cpu", weights_only=True)
    if state["identity"] != json.dumps(identity):
        raise CheckpointError(
            f"{folder / STATE} is of another run ({state['identity']}); give the same options, or start again without resume"
        )
    visual.load_state_dict(state["visual"])
    optimizer.load_state_dict(state["optimizer"])
    log.info("going on from step %d", state["step"])
    return int(state["step"])
