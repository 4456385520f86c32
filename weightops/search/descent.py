"""Find coefficients of task vectors by gradient: AdaMerging, and learned soups."""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np

from weightops.algebra.names import escape
from weightops.errors import NonfiniteError, OptionError
from weightops.evaluation.image_model import ImageModel
from weightops.evaluation.pixels import Indices
from weightops.evaluation.scoring import IMAGES
from weightops.search.session import EditSession, Vectors
from weightops.support.lazy import F, nn, torch, without_gradients
from weightops.support.text import first_few
from weightops.tasks.seeds import seed as seed_of
from weightops.tasks.task import Split, Task

log = logging.getLogger("weightops")

Loss = Literal["entropy", "loss"]
"""What is made small: the entropy of the predictions, or the cross-entropy with the labels."""
Per = Literal["tensor", "task", "direction"]
"""What is searched: a coefficient of each task at each tensor, or of each task; or which singular
directions of each task are taken, beside a coefficient of each task at each tensor."""

START, BATCH = 0.3, 16
"""The coefficients to start from, and the images of each task in a step, as AdaMerging has them."""

PASS = 128
"""The images that pass through the model at once, as many as in a step of fine-tuning."""

Coefficients = dict[str, dict[str, float]]
"""Task -> tensor -> coefficient."""


@dataclass(frozen=True)
class Descent:
    """Options of the search for coefficients by gradient.

    Attributes:
        loss: entropy or loss.
        per: tensor, task or direction.
        on: the split whose images are used.
        steps: steps of Adam; each takes a batch of each task.
        lr: the learning rate of Adam.
        seed: the seed of the order of the images.
        images: the most images of each task to use, the first ones in a fixed random order; None
            for all.
    """

    loss: Loss
    per: Per
    on: Split
    steps: int
    lr: float
    seed: int
    images: int | None = None


class Changes(ABC):
    """Changes of a model's parameters by task vectors, as a search by gradient moves them.

    A parameter's gradient is freed as soon as what is searched has its own gradient of it.

    Args:
        session: the session with the model, which gets the weights of the base.
        vectors: the task vectors.
        on: the split whose images are used.

    Attributes:
        searched: the tensors that the gradient moves.

    Raises:
        OptionError: if images pass through nothing that the vectors change.
    """

    searched: list[torch.Tensor]

    def __init__(self, session: EditSession, vectors: Vectors, on: Split) -> None:
        reached = _reached_at_base(session, on)
        self._parameters = dict(session.model.module.named_parameters())
        self._starts: dict[str, torch.Tensor] = {}
        self._deltas: dict[str, torch.Tensor] = {}
        missed = []
        for name, parameter in self._parameters.items():
            deltas = [v[name] if name in v.specs else None for v in vectors.values()]
            if not any(delta is not None and bool(delta.any()) for delta in deltas):
                continue
            if name not in reached:
                missed.append(name)
                continue
            zero = torch.zeros(parameter.shape)
            stacked = torch.stack([zero if delta is None else delta for delta in deltas])
            self._deltas[name] = stacked.to(parameter.device, torch.float32)
            self._starts[name] = parameter.detach().clone()
        if not self._deltas:
            raise OptionError(
                "images pass through nothing that the task vectors change",
                hint="give vectors of the image encoder",
            )
        if missed:
            log.warning(
                "images don't pass through %s, which the task vectors change: no gradient can say "
                "how much of that to take",
                first_few(missed),
            )

    @property
    def names(self) -> list[str]:
        """The parameters that are changed."""
        return list(self._deltas)

    @abstractmethod
    def change(self, name: str) -> torch.Tensor:
        """Return the present change of a parameter."""

    @abstractmethod
    def take_gradient(self, name: str, gradient: torch.Tensor) -> None:
        """Add what follows from a parameter's gradient to the gradients of what is searched."""

    @without_gradients
    def set(self) -> None:
        """Set the parameters to the present changes of the base."""
        for name, start in self._starts.items():
            self._parameters[name].copy_(start + self.change(name))

    @without_gradients
    def _free_gradient(self, name: str, parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        self.take_gradient(name, parameter.grad.float())
        parameter.grad = None

    @contextmanager
    def differentiated(self) -> Iterator[None]:
        """Let gradients flow to the changed parameters alone, and restore all at the end."""
        with ExitStack() as hooks, _gradients_of(self._parameters, self._deltas):
            for name in self._deltas:
                freed = self._parameters[name].register_post_accumulate_grad_hook(
                    partial(self._free_gradient, name)
                )
                hooks.callback(freed.remove)
            try:
                yield
            finally:
                with torch.no_grad():
                    for name, start in self._starts.items():
                        self._parameters[name].copy_(start)


class WeightedSum(Changes):
    """The sum ``sum_i lambda_i tau_i``, with a lambda for each task, or for each at each tensor.

    The gradient of lambda_i at a tensor is the inner product of tau_i with the parameter's.
    """

    def __init__(self, session: EditSession, vectors: Vectors, on: Split, per: Per) -> None:
        super().__init__(session, vectors, on)
        width = len(self._deltas) if per == "tensor" else 1
        self._lambdas = nn.Parameter(torch.full((len(vectors), width), START))
        self.searched: list[torch.Tensor] = [self._lambdas]
        self._column = {name: i if per == "tensor" else 0 for i, name in enumerate(self._deltas)}

    def weights(self, name: str) -> torch.Tensor:
        """Return the tasks' coefficients at a parameter, shape ``(k,)``."""
        return self._lambdas[:, self._column[name]].detach().to(self._deltas[name].device)

    def change(self, name: str) -> torch.Tensor:
        change: torch.Tensor = torch.tensordot(self.weights(name), self._deltas[name], dims=1)
        return change

    def take_gradient(self, name: str, gradient: torch.Tensor) -> None:
        self.add_products(name, self._deltas[name].flatten(1) @ gradient.flatten())

    def mean(self, place: int) -> float:
        """Return the mean coefficient of a task, which tensors without one have."""
        return float(self._lambdas[place].detach().mean())

    def add_products(self, name: str, products: torch.Tensor) -> None:
        """Add inner products with a parameter's gradient to those of its coefficients."""
        assert self._lambdas.grad is not None
        self._lambdas.grad[:, self._column[name]] += products.cpu()

    def coefficients(self, vectors: Vectors) -> Coefficients:
        """Return the coefficients by task and tensor; tensors without one have the mean."""
        found = {}
        for place, (vector, row) in enumerate(zip(vectors, self._lambdas.detach(), strict=True)):
            values, mean = {n: float(row[i]) for n, i in self._column.items()}, self.mean(place)
            found[vector] = {name: values.get(name, mean) for name in vectors[vector].specs}
        return found


def check_images(session: EditSession, what: str, hint: str) -> None:
    """Refuse other tasks than those of images.

    Raises:
        OptionError: naming what takes them.
    """
    if session.scoring is not IMAGES:
        raise OptionError(f"{what} takes tasks of images, and a model of images", hint=hint)


def _reached_at_base(session: EditSession, on: Split) -> set[str]:
    """Return the parameters that images pass through, after setting the weights of the base."""
    model = session.model
    session.base.load_into(model.module)
    model.module.eval()
    own = dict(model.module.named_parameters())
    names = [name for name, parameter in own.items() if parameter.is_floating_point()]
    image = model.pixels(session.tasks[0], on).batch(np.zeros(1, np.int64))
    with _gradients_of(own, names):
        total = model.encode_image(image).sum()
        gradients = torch.autograd.grad(total, [own[name] for name in names], allow_unused=True)
    return {name for name, gradient in zip(names, gradients, strict=True) if gradient is not None}


@contextmanager
def _gradients_of(parameters: Mapping[str, nn.Parameter], names: Collection[str]) -> Iterator[None]:
    """Let gradients flow to some parameters alone, and restore the flags of all at the end."""
    before = {name: parameter.requires_grad for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in names)
    try:
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.requires_grad_(before[name])


def follow(session: EditSession, changes: Changes, tasks: Sequence[Task], options: Descent) -> None:
    """Move changes of the session's model by steps of Adam, against the gradient of a mean loss.

    Raises:
        NonfiniteError: if the loss becomes NaN or infinite.
    """
    orders = {task: _order(session, task, options) for task in tasks}
    heads = {task: session.model.zero_shot_head(task) for task in tasks}
    at_once = PASS // BATCH
    optimizer = torch.optim.Adam(changes.searched, lr=options.lr)
    with changes.differentiated():
        for step in range(options.steps):
            changes.set()
            for tensor in changes.searched:
                tensor.grad = torch.zeros_like(tensor)
            for first in range(0, len(tasks), at_once):
                batches = {task: next(orders[task]) for task in tasks[first : first + at_once]}
                losses = _losses(session.model, batches, heads, options)
                _check_losses(losses, step, options.loss)
                (torch.stack(list(losses.values())).sum() / len(tasks)).backward()  # type: ignore[no-untyped-call]
            optimizer.step()


def _losses(
    model: ImageModel,
    batches: Mapping[Task, Indices],
    heads: Mapping[Task, torch.Tensor],
    options: Descent,
) -> dict[str, torch.Tensor]:
    """Return the loss of each task's images, from one pass of all of them."""
    splits = {task: model.pixels(task, options.on) for task in batches}
    images = torch.cat([splits[task].batch(indices) for task, indices in batches.items()])
    features = torch.split(model.encode_image(images), [len(i) for i in batches.values()])
    losses = {}
    for (task, indices), of_task in zip(batches.items(), features, strict=True):
        labels = splits[task].labels[torch.from_numpy(indices)].to(of_task.device)
        losses[task.name] = _loss(of_task @ heads[task].T, labels, options.loss)
    return losses


def _check_losses(losses: Mapping[str, torch.Tensor], step: int, kind: Loss) -> None:
    for task, loss in losses.items():
        value = float(loss.detach())
        if not math.isfinite(value):
            damaged = "the weights are damaged: `weightops inspect` shows them"
            raise NonfiniteError(
                f"the {kind} of {task} is {value} at step {step}",
                hint="lower search_lr=" if step else damaged,
            )


def _loss(logits: torch.Tensor, labels: torch.Tensor, kind: Loss) -> torch.Tensor:
    if kind == "loss":
        return F.cross_entropy(logits, labels)
    logs = logits.log_softmax(-1)
    return -(logs.exp() * logs).sum(-1).mean()


def _order(session: EditSession, task: Task, options: Descent) -> Iterator[Indices]:
    """Yield batches of indices of a task's images, in a new order when all have been used."""
    size = len(session.model.pixels(task, options.on))
    generator = np.random.default_rng(seed_of("descent", options.seed, task.name))
    used = np.arange(size)
    if options.images is not None:
        used = np.random.default_rng(0).permutation(size)[: options.images]
        size = len(used)
    while True:
        order = used[generator.permutation(size)]
        for start in range(0, max(size - BATCH + 1, 1), BATCH):
            yield order[start : start + BATCH]


def scaled(vectors: Vectors, coefficients: Mapping[str, Mapping[str, float]]) -> Vectors:
    """Return the vectors multiplied by coefficients by tensor."""
    return {
        task: vector * {escape(name): value for name, value in coefficients[task].items()}
        for task, vector in vectors.items()
    }


def recipe_of(
    coefficients: Mapping[str, Mapping[str, float]], models: Mapping[str, str], base: str
) -> dict[str, Any]:
    """Return the recipe that adds the task vectors of models by coefficients by tensor.

    Args:
        coefficients: task -> tensor -> coefficient.
        models: task -> the ref of its model or vector.
        base: the ref of the base.
    """
    entries = [
        {"model": models[task], "weight": {escape(n): v for n, v in of_task.items()}}
        for task, of_task in coefficients.items()
    ]
    return {"method": "task_arithmetic", "base": base, "models": entries}
