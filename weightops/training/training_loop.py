"""The training loop: which samples a step sees, what it does, and what the run keeps of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from weightops.algebra.dtypes import accumulator
from weightops.algebra.names import NameRules
from weightops.checkpoints.formats.memory import MemorySource
from weightops.errors import OptionError
from weightops.support.lazy import F, torch, without_gradients
from weightops.support.progress import progress
from weightops.training.config import TrainingConfig
from weightops.training.fsdp import TrainingState, gather, local_part
from weightops.training.learners import Learner
from weightops.training.log_sinks import OnLine
from weightops.training.nodes import Node, OneProcess
from weightops.training.run_folder import RunFolder, Stateful

LOG_EVERY = 10
"""Steps between lines of the log."""


def train(
    learner: Learner,
    config: TrainingConfig,
    node: Node,
    strategy: OneProcess,
    folder: RunFolder | None,
    *,
    start: int,
    checkpoint_every: int,
    on_step: Callable[[int], None] | None,
    on_line: OnLine = lambda line: None,
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Train a learner from step ``start`` to the last, with logs and states in the folder.

    Returns:
        The tensors of the whole module, and the same with the moving average, on CPU; the second is
        empty if there is no moving average.
    """
    which = f" (node {node.index} of {node.count})" if node.count > 1 else ""
    title = f"fine-tuning on {learner.name}{which}"
    with (
        _training_mode(learner),
        progress(config.steps, title, "steps", work=step_work(config, node)) as bar,
    ):
        trainer = _Trainer(learner, config, node, strategy)
        if folder is not None:
            folder.restore(trainer.stateful, start)
        bar.update(start)
        lines = folder.lines if folder is not None else []
        seconds_before = lines[-1]["seconds"] if lines else 0.0
        started = time.monotonic()
        for step in range(start, config.steps):
            loss = trainer.step(step)
            done = step + 1
            if on_step is not None:
                on_step(done)
            bar.update()
            if step % LOG_EVERY == 0 or done == config.steps:
                seconds = seconds_before + time.monotonic() - started
                line = {"step": done, "loss": loss.item(), "lr": config.learning_rate(step)}
                lines.append({**line, "seconds": seconds, "communication": strategy.seconds})
                on_line(lines[-1])
                bar.note(f"loss {line['loss']:.3f}")
            if folder is not None and done % checkpoint_every == 0 and done < config.steps:
                states = {name: target.state_dict() for name, target in trainer.stateful.items()}
                if strategy.rank == 0:
                    folder.keep(states, done)
    weights = learner.weights()
    return weights, trainer.ema.within(weights)


def step_work(config: TrainingConfig, node: Node | None = None) -> float:
    """Return the work of a step, in images that a model classifies.

    A step goes through the model forwards once and backwards at twice the cost.
    """
    return 3 * (node or Node()).batch_size(config.batch_size)


class _Trainer:
    """A learner with its optimizer and moving average, in this process's share of a run."""

    def __init__(
        self, learner: Learner, config: TrainingConfig, node: Node, strategy: OneProcess
    ) -> None:
        self.learner, self.config, self.node, self.strategy = learner, config, node, strategy
        self.node_batch = node.batch_size(config.batch_size)
        self.own = strategy.local_slice(self.node_batch)
        # The mean over processes of the means over their samples is then the mean over the batch.
        self.share = (self.own.stop - self.own.start) * strategy.size / self.node_batch
        self.averaged = NameRules.of(dict.fromkeys(node.only, 1.0))
        self.averaged.check(learner.module.state_dict())
        self.parallel = strategy.parallel(learner)
        self.parameters = [p for p in learner.trained.parameters() if p.is_floating_point()]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=config.lr, weight_decay=config.weight_decay, fused=True
        )
        self.ema = _Ema(learner, config.ema)
        state = TrainingState(learner.trained, self.optimizer)
        self.stateful: dict[str, Stateful] = {"learning": state, "ema": self.ema}

    def step(self, step: int) -> torch.Tensor:
        """Make an optimizer step, average over the nodes where it is time, and return the loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate(step)
        try:
            loss = self._loss(step)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise OptionError(
                f"{self.learner.name}: batch normalisation needs more than one image at a time",
                hint="batch_size=2 or more, on each process",
            ) from error
        self.optimizer.zero_grad()
        (loss * (-self.share if self.config.ascend else self.share)).backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm)
        self.optimizer.step()
        done = step + 1
        if self.node.averages_before(done) > self.node.averages_before(step):
            state = {n: t for n, t in self.learner.state().items() if self.averaged(n)}
            self.strategy.average_(state, done * self.node_batch, done)
        self.ema.update()
        return loss

    def _loss(self, step: int) -> torch.Tensor:
        learner, config, node = self.learner, self.config, self.node
        indices = batch_indices(len(learner), config.batch_size, step, config.seed, node)
        inputs, labels = learner.batch(torch.from_numpy(indices[self.own]))
        key = node.key(config.seed, step)
        inputs = _shifted(inputs, config.shift, key, self.own, self.node_batch)
        loss: torch.Tensor = self.parallel(inputs.to(learner.device), labels.to(learner.device))
        return loss


class _Ema:
    """The moving average of the tensors that a learner trains; empty for a decay of 0.

    It is kept in float32: a step of a thousandth of the way is less than bfloat16 can tell.
    """

    def __init__(self, learner: Learner, decay: float) -> None:
        self._learner, self._decay = learner, decay
        state = learner.state() if decay else {}
        self._mean = {name: _widened(t.detach()).clone() for name, t in state.items()}

    @without_gradients
    def update(self) -> None:
        """Move the average towards the learner's tensors."""
        now = self._learner.state() if self._decay else {}
        for name, mean in self._mean.items():
            if mean.is_floating_point():
                mean.lerp_(_widened(now[name]), 1 - self._decay)
            else:
                mean.copy_(now[name])

    def within(self, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return weights with the average in place of what was trained; empty for a decay of 0."""
        ties = MemorySource(weights, "").ties
        means = self.state_dict()
        both = {n: (means.get(ties.get(n, n), weight), weight) for n, weight in weights.items()}
        return {n: mean.to(weight.dtype) for n, (mean, weight) in both.items()} if means else {}

    def state_dict(self) -> dict[str, Any]:
        return {name: gather(mean) for name, mean in self._mean.items()}

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        for name, mean in self._mean.items():
            mean.copy_(local_part(state_dict[name], mean))


def _widened(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(accumulator(tensor.dtype)) if tensor.is_floating_point() else tensor


@contextmanager
def _training_mode(learner: Learner) -> Iterator[None]:
    """Let only the trained part learn; restore flags and the caller's random state at the end."""
    flags = {name: parameter.requires_grad for name, parameter in learner.module.named_parameters()}
    was_training = learner.module.training
    learner.module.requires_grad_(False)
    learner.trained.requires_grad_(True)
    learner.module.train()
    devices = [learner.device] if learner.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        # By name, because sharding has replaced the parameters.
        for name, parameter in learner.module.named_parameters():
            parameter.requires_grad_(flags[name])
            parameter.grad = None
        learner.module.train(was_training)


def batch_indices(
    samples: int, batch_size: int, step: int, seed: int, node: Node | None = None
) -> npt.NDArray[np.int64]:
    """Return the indices of a node's samples in a step.

    Each epoch has a new order. The indices depend on the arguments alone, so that a run can be
    resumed anywhere.

    Args:
        samples: number of samples to learn from.
        batch_size: samples per step, of all nodes together.
        step: the step, counted from 0.
        seed: seed of the order.
        node: the node; by default the only one.
    """
    node = node or Node()
    length, size = node.batch_size(batch_size), len(_epoch(node, samples, seed, 0))
    epochs, places = np.divmod(np.arange(step * length, (step + 1) * length), size)
    parts = [
        _epoch(node, samples, seed, int(epoch))[places[epochs == epoch]]
        for epoch in np.unique(epochs)
    ]
    return np.concatenate(parts)


@lru_cache(maxsize=4)
def _epoch(node: Node, samples: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """Return a node's samples in the order of an epoch, which is drawn once."""
    pool = node.samples(samples, seed)
    return pool[np.random.default_rng(node.key(seed, epoch)).permutation(len(pool))]


def _shifted(
    images: torch.Tensor, shift: float, key: list[int], own: slice, count: int
) -> torch.Tensor:
    """Move each image by its own whole number of pixels, and seed whatever is random in the model.

    The offsets are drawn for all ``count`` images of the node's batch, so that an image's offset
    doesn't depend on the number of processes. The border is repeated.
    """
    seed = int(np.random.default_rng(key).integers(1 << 62))
    torch.manual_seed(seed)
    height, width = images.shape[-2:] if images.dim() == 4 else (0, 0)
    reach = round(shift * min(height, width))
    offsets = torch.randint(0, 2 * reach + 1, (count, 2)).tolist()[own] if reach else []
    if own.start:  # processes draw different numbers in the model
        torch.manual_seed(seed + own.start)
    if not reach:
        return images
    padded = F.pad(images, (reach,) * 4, mode="replicate")
    shifted = [
        image[:, y : y + height, x : x + width]
        for image, (y, x) in zip(padded, offsets, strict=True)
    ]
    return torch.stack(shifted)
