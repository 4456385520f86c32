"""Fine-tune an image encoder under a frozen zero-shot head (arXiv 2208.05592, 2212.04089)."""

from __future__ import annotations

import io
import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
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
from weightops.errors import CheckpointError, TaskError
from weightops.evaluators.clip import Clip
from weightops.evaluators.zero_shot import as_tasks
from weightops.expression import LinearForm
from weightops.files import check_free, whole
from weightops.tasks.task import Task

log = logging.getLogger("weightops")

WEIGHTS, LOG, RECORD, STATE = "finetuned.safetensors", "log.jsonl", "training.json", "training.pt"


@dataclass(frozen=True)
class TrainingConfig:
    """How to fine-tune; the defaults are the papers' for CLIP. A model may carry its own (see `config_for`).

    Attributes:
        steps: optimizer steps.
        batch_size: images a step.
        lr: peak learning rate of AdamW, after a linear warm-up and before a cosine decay to 0.
        weight_decay: of AdamW.
        warmup: steps of warm-up; at most a tenth of all steps.
        max_grad_norm: gradients are scaled down to this norm.
        shift: move the images of a batch by up to this fraction of their side; 0 for no augmentation.
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
    seed: int = 0
    ascend: bool = False

    def learning_rate(self, step: int) -> float:
        """The learning rate at a step, counted from 0."""
        warmup = min(self.warmup, self.steps // 10)
        if step < warmup:
            return self.lr * (step + 1) / warmup
        return self.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, self.steps - warmup)))


def config_for(model: Checkpoint, **changes: Any) -> TrainingConfig:
    """The papers' recipe, changed by what the model's own configuration says (``weightops.finetune``) and then by ``changes``."""
    own = getattr(model.architecture, "config", {}).get("weightops", {}).get("finetune", {})
    return replace(TrainingConfig(), **{**own, **{name: value for name, value in changes.items() if value is not None}})


def finetune(
    model: CheckpointLike | Clip,
    task: str | Task,
    config: TrainingConfig | None = None,
    *,
    out: str | Path | None = None,
    checkpoint_every: int = 250,
    resume: bool = False,
    overwrite: bool = False,
    device: str = "auto",
    on_step: Callable[[int], None] | None = None,
) -> Checkpoint:
    """Fine-tune the image encoder on a task; the text encoder, and so the head, stays as it is.

    Args:
        model: what to start from: anything with a known architecture, or a `Clip`, whose module is then trained in place.
        task: a name or a `Task`; its training split is used and no other.
        config: how; by default `config_for` the model.
        out: a folder for ``finetuned.safetensors``, ``log.jsonl`` and ``training.json``, and for the state while it runs.
        checkpoint_every: steps between states that a killed run can be resumed from.
        resume: go on from the state in ``out``; on CPU, with the same threads, the weights end the same to the bit.
        overwrite: replace a finished run in ``out``; it stays until the new one is complete.
        device: "auto", "cpu", "cuda", ...
        on_step: called after each step with its number, counted from 1; the module is what has been learned so far.

    Returns:
        The fine-tuned weights, in memory, or from ``out`` where it is given.

    Raises:
        OutputError: if ``out`` holds a finished run and neither ``resume`` nor ``overwrite`` is set.
        CheckpointError: if what is to be resumed is of another run.
    """
    clip = Clip.open(model, device)
    [task] = as_tasks(task)
    config = config or config_for(clip.base)
    identity = {"config": asdict(config), "base": clip.base.fingerprint, "task": task.name, "source": task.source}
    folder = Folder(Path(out), identity) if out is not None else None
    if folder is not None and folder.begin(resume=resume, overwrite=overwrite):
        return Checkpoint(open_checkpoint(folder.path / WEIGHTS).form, clip.base.architecture)
    try:
        state = _train(clip, task, config, folder, checkpoint_every, on_step)
        source = MemorySource(state, f"{clip.base.ref} fine-tuned on {task.name}")
        result = Checkpoint(LinearForm.of(source), clip.base.architecture)
        if folder is None:
            return result
        folder.finish(result)
    except BaseException:
        if folder is not None:
            with suppress(OSError):
                folder.path.rmdir()  # if there is nothing in it
        raise
    return Checkpoint(open_checkpoint(folder.path / WEIGHTS).form, clip.base.architecture)


class Folder:
    """A run's folder: its state while it lasts, its weights, log and record at the end.

    Args:
        path: the folder.
        identity: what makes it this run; nothing of another is resumed.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        self.path = path
        self.identity = json.loads(json.dumps(identity))
        self.lines: list[dict[str, float]] = []

    def begin(self, *, resume: bool, overwrite: bool) -> bool:
        """Make the folder ready; True if the run in it is finished already.

        Raises:
            OutputError: if it is, and is neither to be resumed nor overwritten.
            CheckpointError: if it is to be resumed, and is of another run.
        """
        if resume and not (self.path / STATE).is_file() and (self.path / WEIGHTS).is_file():
            try:
                self._same(json.loads((self.path / RECORD).read_text(encoding="utf-8")))
            except (OSError, ValueError) as error:
                raise CheckpointError(f"{self.path} holds weights and no record of how they were made") from error
            return True
        if not resume:
            check_free(self.path / WEIGHTS, overwrite=overwrite)
        self.path.mkdir(parents=True, exist_ok=True)
        if not resume:
            (self.path / STATE).unlink(missing_ok=True)
        return False

    def _same(self, identity: Any) -> None:
        if identity != self.identity:
            raise CheckpointError(
                f"{self.path} holds another run ({json.dumps(identity)}); give the same options, or start again without resume"
            )

    def restore(self, visual: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
        """Load the state, if there is one; the step to go on from."""
        if not (self.path / STATE).is_file():
            return 0
        state = torch.load(self.path / STATE, map_location="cpu", weights_only=True)
        self._same(json.loads(state["identity"]))
        visual.load_state_dict(state["visual"])
        optimizer.load_state_dict(state["optimizer"])
        self.lines = json.loads(state["lines"])
        log.info("going on from step %d", state["step"])
        return int(state["step"])

    def keep(self, visual: torch.nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Write the state to go on from, whole or not at all."""
        content = io.BytesIO()  # torch.save to a file tells of a full disk in its own way
        named = {"visual": visual.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(
            {"identity": json.dumps(self.identity), "step": step, "lines": json.dumps(self.lines), **named}, content
        )
        with whole(self.path / STATE, overwrite=True) as part:
            part.write_bytes(content.getbuffer())
        self._write(LOG, "".join(json.dumps(line) + "\n" for line in self.lines))

    def finish(self, weights: Checkpoint) -> None:
        """Write what is left of the run."""
        self._write(LOG, "".join(json.dumps(line) + "\n" for line in self.lines))
        self._write(RECORD, json.dumps(self.identity, indent=2) + "\n")
        weights.save(self.path / WEIGHTS, overwrite=True, on_nonfinite="error")
        (self.path / STATE).unlink(missing_ok=True)

    def _write(self, name: str, text: str) -> None:
        with whole(self.path / name, overwrite=True) as part:
            part.write_text(text, encoding="utf-8")


def _train(
    clip: Clip,
    task: Task,
    config: TrainingConfig,
    folder: Folder | None,
    every: int,
    on_step: Callable[[int], None] | None,
) -> dict[str, torch.Tensor]:
    """The loop; the module's whole state at its end, on CPU."""
    head = clip.zero_shot_head(task)
    pixels = clip.pixels(task, "train")
    if not len(pixels):
        raise TaskError(f"{task.name} has no training images")
    visual = clip.module.visual
    parameters = [p for p in visual.parameters() if p.is_floating_point()]
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay)
    first = folder.restore(visual, optimizer) if folder is not None else 0
    lines = folder.lines if folder is not None else []
    before = lines[-1]["seconds"] if lines else 0.0
    mixed = clip.device.type == "cuda"
    started = time.monotonic()
    bar = tqdm(total=config.steps, initial=first, desc=f"fine-tuning on {task.name}", unit="step", delay=1, leave=False)
    with _training(clip), bar:
        for step in range(first, config.steps):
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate(step)
            indices = batch_indices(len(pixels), config.batch_size, step, config.seed)
            images = _shifted(pixels.batch(indices), config, step).to(clip.device)
            with torch.autocast(clip.device.type, torch.bfloat16, enabled=mixed):
                features = clip.encode_image(images)
            loss = F.cross_entropy(features @ head.T, pixels.labels[indices].to(clip.device))
            optimizer.zero_grad()
            (-loss if config.ascend else loss).backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
            optimizer.step()
            if on_step is not None:
                on_step(step + 1)
            bar.update()
            if step % 10 == 0 or step + 1 == config.steps:
                bar.set_postfix(loss=f"{loss.item():.3f}")
                seconds = before + time.monotonic() - started
                lines.append(
                    {"step": step + 1, "loss": loss.item(), "lr": config.learning_rate(step), "seconds": seconds}
                )
            if folder is not None and (step + 1) % every == 0 and step + 1 < config.steps:
                folder.keep(visual, optimizer, step + 1)
    return {name: tensor.detach().cpu().clone() for name, tensor in clip.module.state_dict().items()}


@contextmanager
def _training(clip: Clip) -> Iterator[None]:
    """Only the image encoder learns; the module's flags and the caller's random numbers are put back at the end."""
    flags = [(parameter, parameter.requires_grad) for parameter in clip.module.parameters()]
    was_training = clip.module.training
    clip.module.requires_grad_(False)
    clip.module.visual.requires_grad_(True)
    clip.module.train()
    try:
        with torch.random.fork_rng(devices=[clip.device] if clip.device.type == "cuda" else []):
            yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
            parameter.grad = None
        clip.module.train(was_training)


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
    seed = int(np.random.default_rng([config.seed, step]).integers(1 << 62))
    torch.manual_seed(seed)  # for whatever is random in the model, too
    height, width = images.shape[-2:]
    reach = round(config.shift * min(height, width))
    if not reach:
        return images
    padded = F.pad(images, (reach,) * 4, mode="replicate")
    offsets = torch.randint(0, 2 * reach + 1, (len(images), 2)).tolist()
    return torch.stack([image[:, y : y + height, x : x + width] for image, (y, x) in zip(padded, offsets, strict=True)])
