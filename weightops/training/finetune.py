"""Fine-tune an image encoder under a frozen zero-shot head (arXiv 2208.05592, 2212.04089): one loop, on one process, several or many nodes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from tqdm import tqdm

from weightops.algebra.linear_form import LinearForm
from weightops.algebra.names import NameRules
from weightops.checkpoints.checkpoint import Checkpoint
from weightops.checkpoints.formats.memory import MemorySource
from weightops.checkpoints.opening import CheckpointLike
from weightops.errors import OptionError
from weightops.evaluation.image_model import ImageModel
from weightops.tasks.table import as_tasks
from weightops.tasks.task import Task
from weightops.training.config import TrainingConfig, config_for
from weightops.training.fsdp import Learning, gather, local_part
from weightops.training.learners import ImageLearner, Learner
from weightops.training.nodes import LofiNode, Node, OneProcess
from weightops.training.run_folder import RunFolder, Stateful


def finetune(
    model: CheckpointLike | ImageModel,
    task: str | Task,
    config: TrainingConfig | None = None,
    *,
    out: str | Path | None = None,
    checkpoint_every: int = 250,
    resume: bool = False,
    overwrite: bool = False,
    device: str = "auto",
    node: Node | None = None,
    strategy: OneProcess | None = None,
    on_step: Callable[[int], None] | None = None,
) -> Checkpoint:
    """Fine-tune the image encoder on a task; the text encoder, and so the head, stays as it is. Of timm's classifiers all is fine-tuned.

    Args:
        model: what to start from: anything with a known architecture, or a `ImageModel`, whose module is then trained in place.
        task: a name or a `Task`; its training split is used and no other.
        config: how; by default `config_for` the model.
        out: a folder for the weights, which opens as a model, ``log.jsonl`` and ``training.json``, and for the state while
            it runs. All processes of a node must see it.
        checkpoint_every: steps between states that a killed run can be resumed from.
        resume: go on from the state in ``out``; on CPU, with the same threads, the weights end the same to the bit.
        overwrite: replace a finished run in ``out``; it stays until the new one is complete.
        device: "auto", "cpu", "cuda", ...
        node: which of several nodes this is, and so which images it sees (lo-fi, arXiv 2210.11948); the only one by default.
        strategy: the processes that make up the node; by default just this one (see `weightops.nodes`).
        on_step: called after each step with its number, counted from 1; the module is what has been learned so far.

    Returns:
        The fine-tuned weights, in memory, or from ``out`` where it is given.

    Raises:
        OutputError: if ``out`` holds a finished run and neither ``resume`` nor ``overwrite`` is set.
        CheckpointError: if what is to be resumed is of another run.
        NonfiniteError: if weights have become NaN or infinite and were to be written to ``out``.
    """
    [task] = as_tasks(task)
    clip = ImageModel.open(model, device, learning=task)
    return fit(
        ImageLearner(clip, task),
        config or config_for(clip.base),
        out=out,
        checkpoint_every=checkpoint_every,
        resume=resume,
        overwrite=overwrite,
        node=node,
        strategy=strategy,
        on_step=on_step,
    )


def fit(
    learner: Learner,
    config: TrainingConfig,
    *,
    out: str | Path | None = None,
    checkpoint_every: int = 250,
    resume: bool = False,
    overwrite: bool = False,
    node: Node | None = None,
    strategy: OneProcess | None = None,
    on_step: Callable[[int], None] | None = None,
) -> Checkpoint:
    """Fine-tune any learner, in place; see `finetune` for arguments, result and errors."""
    node, strategy = node or Node(), strategy or OneProcess()
    if node.every and not isinstance(strategy, LofiNode):
        raise OptionError(
            "nodes that average on the way must run at once: start them with torchrun"
        )
    base, first = learner.base, strategy.rank == 0
    identity = {
        "config": asdict(config),
        "base": base.fingerprint,
        "task": learner.name,
        "digest": learner.digest,
        "node": asdict(node),
    }
    folder = (
        RunFolder(Path(out), identity, base.architecture, config.steps, node.stretch)
        if out is not None
        else None
    )
    begun, finished = 0, False
    try:
        if first and folder is not None:
            begun = strategy.agree(folder.begin(resume=resume, overwrite=overwrite), node, folder)
            finished = folder.finished and begun == config.steps
            folder.go_back(begun)
            strategy.mark()
        begun, finished = strategy.tell((begun, finished))
        if folder is not None and finished:
            return folder.weights()
        learner.prepare()
        weights, ema = _train(
            learner, config, node, strategy, folder, begun, checkpoint_every, on_step
        )
        if folder is None or not first:
            source = MemorySource(weights, f"{base.ref} fine-tuned on {learner.name}")
            return Checkpoint(LinearForm.of(source), base.architecture)
        samples = config.steps * node.batch_size(config.batch_size)
        facts = {
            "model": base.ref,
            "source": learner.source,
            "samples": samples,
            "communication_seconds": strategy.seconds,
        }
        folder.finish(weights, ema, **facts)
    except BaseException:
        if folder is not None and first:
            with suppress(OSError):
                folder.path.rmdir()  # if there is nothing in it
        raise
    return folder.weights()


def _train(
    learner: Learner,
    config: TrainingConfig,
    node: Node,
    strategy: OneProcess,
    folder: RunFolder | None,
    begun: int,
    every: int,
    on_step: Callable[[int], None] | None,
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The loop; the module's whole state at its end, and with the moving average in it if there is one, on CPU."""
    count, mine = (
        node.batch_size(config.batch_size),
        strategy.part(node.batch_size(config.batch_size)),
    )
    share = (
        (mine.stop - mine.start) * strategy.size / count
    )  # so that the mean of means is the batch's mean
    averaged = NameRules.of(dict.fromkeys(node.only, 1.0))
    averaged.check(learner.module.state_dict())
    what = f"fine-tuning on {learner.name}"
    with (
        _training(learner),
        tqdm(total=config.steps, desc=what, unit="step", delay=1, leave=False) as bar,
    ):
        parallel = strategy.parallel(learner)
        parameters = [p for p in learner.trained.parameters() if p.is_floating_point()]
        optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay)
        ema = _Ema(learner, config.ema)
        parts: dict[str, Stateful] = {"learning": Learning(learner.trained, optimizer), "ema": ema}
        lines: list[dict[str, float]] = []
        if folder is not None:
            folder.restore(parts, begun)
            lines = folder.lines
        bar.update(begun)
        before = lines[-1]["seconds"] if lines else 0.0
        started = time.monotonic()
        for step in range(begun, config.steps):
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate(step)
            indices = batch_indices(len(learner), config.batch_size, step, config.seed, node)
            inputs, labels = learner.batch(torch.from_numpy(indices[mine]))
            inputs = _shifted(inputs, config, node.key(config.seed, step), mine, count)
            loss = parallel(inputs.to(learner.device), labels.to(learner.device))
            optimizer.zero_grad()
            (loss * (-share if config.ascend else share)).backward()
            torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
            optimizer.step()
            if node.every and (step + 1) % node.every == 0:
                state = {n: t for n, t in learner.state().items() if averaged(n)}
                strategy.average_(state, (step + 1) * count, step + 1)
            ema.update()
            if on_step is not None:
                on_step(step + 1)
            bar.update()
            if step % 10 == 0 or step + 1 == config.steps:
                bar.set_postfix(loss=f"{loss.item():.3f}")
                seconds = before + time.monotonic() - started
                lines.append(
                    {
                        "step": step + 1,
                        "loss": loss.item(),
                        "lr": config.learning_rate(step),
                        "seconds": seconds,
                        "communication": strategy.seconds,
                    }
                )
            if folder is not None and (step + 1) % every == 0 and step + 1 < config.steps:
                states = {name: part.state_dict() for name, part in parts.items()}
                if strategy.rank == 0:
                    folder.keep(states, step + 1)
    weights = learner.weights()
    return weights, ema.within(weights)


class _Ema:
    """The moving average of what a learner learns; nothing for a decay of 0."""

    def __init__(self, learner: Learner, decay: float) -> None:
        self._learner, self._decay = learner, decay
        self._mean = {n: t.detach().clone() for n, t in learner.state().items()} if decay else {}

    @torch.no_grad()
    def update(self) -> None:
        now = self._learner.state() if self._decay else {}
        for name, mean in self._mean.items():
            if mean.is_floating_point():
                mean.lerp_(now[name], 1 - self._decay)
            else:
                mean.copy_(now[name])

    def within(self, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The weights with the averages in place of what learnt; nothing for a decay of 0."""
        ties = MemorySource(weights, "").ties
        means = self.state_dict()
        return {n: means.get(ties.get(n, n), weights[n]) for n in weights} if means else {}

    def state_dict(self) -> dict[str, Any]:
        return {name: gather(mean) for name, mean in self._mean.items()}

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        for name, mean in self._mean.items():
            mean.copy_(local_part(state_dict[name], mean))


@contextmanager
def _training(learner: Learner) -> Iterator[None]:
    """Only what is to learn learns; the module's flags and the caller's random numbers are put back at the end."""
    flags = {name: parameter.requires_grad for name, parameter in learner.module.named_parameters()}
    was_training = learner.module.training
    learner.module.requires_grad_(False)
    learner.trained.requires_grad_(True)
    learner.module.train()
    try:
        with torch.random.fork_rng(
            devices=[learner.device] if learner.device.type == "cuda" else []
        ):
            yield
    finally:
        for (
            name,
            parameter,
        ) in learner.module.named_parameters():  # sharded ones are others than before
            parameter.requires_grad_(flags[name])
            parameter.grad = None
        learner.module.train(was_training)


def batch_indices(
    images: int, batch_size: int, step: int, seed: int, node: Node | None = None
) -> npt.NDArray[np.int64]:
    """A node's images of a step: a new order each epoch, a function of its arguments alone, so that a run can be resumed anywhere."""
    node = node or Node()
    pool, length = node.images(images, seed), node.batch_size(batch_size)
    place = np.arange(step * length, (step + 1) * length)
    epochs = {
        int(epoch): np.random.default_rng(node.key(seed, int(epoch))).permutation(len(pool))
        for epoch in np.unique(place // len(pool))
    }
    return pool[[epochs[int(p // len(pool))][p % len(pool)] for p in place]]


def _shifted(
    images: torch.Tensor, config: TrainingConfig, key: list[int], mine: slice, count: int
) -> torch.Tensor:
    """This process's images of a batch of ``count``, each moved by its own whole number of pixels; the border is repeated."""
    seed = int(np.random.default_rng(key).integers(1 << 62))
    torch.manual_seed(seed)  # for whatever is random in the model, too
    height, width = images.shape[-2:] if images.dim() == 4 else (0, 0)
    reach = round(config.shift * min(height, width))
    offsets = torch.randint(0, 2 * reach + 1, (count, 2)).tolist()[mine] if reach else []
    if mine.start:
        torch.manual_seed(seed + mine.start)
    if not reach:
        return images
    padded = F.pad(images, (reach,) * 4, mode="replicate")
    return torch.stack(
        [
            image[:, y : y + height, x : x + width]
            for image, (y, x) in zip(padded, offsets, strict=True)
        ]
    )
