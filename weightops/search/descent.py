"""Find coefficients of task vectors by gradient: AdaMerging, and learned soups."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np

from weightops.algebra.names import escape
from weightops.errors import NonfiniteError, OptionError
from weightops.evaluation.scoring import IMAGES
from weightops.search.session import EditSession, Vectors
from weightops.support.lazy import F, nn, torch, without_gradients
from weightops.tasks.seeds import seed as seed_of
from weightops.tasks.task import Split, Task

Loss = Literal["entropy", "loss"]
"""What is made small: the entropy of the predictions, or the cross-entropy with the labels."""
Per = Literal["tensor", "task"]
"""What has a coefficient of its own: each task at each tensor, or each task."""

START, BATCH = 0.3, 16
"""The coefficients to start from, and the images of each task in a step, as AdaMerging has them."""

Coefficients = dict[str, dict[str, float]]
"""Task -> tensor -> coefficient."""


@dataclass(frozen=True)
class Descent:
    """Options of the search for coefficients by gradient.

    Attributes:
        loss: entropy or loss.
        per: tensor or task.
        on: the split whose images are used.
        steps: steps of Adam; each takes a batch of each task.
        lr: the learning rate of Adam.
        seed: the seed of the order of the images.
    """

    loss: Loss
    per: Per
    on: Split
    steps: int
    lr: float
    seed: int


class _Sum:
    """A model's parameters as ``theta_0 + sum_i lambda_i tau_i``, and gradients of the lambdas.

    The gradient of lambda_i at a tensor is the inner product of tau_i with the parameter's
    gradient, which is freed as soon as it is there.
    """

    def __init__(self, module: nn.Module, vectors: Vectors, per: Per) -> None:
        changed = {name for vector in vectors.values() for name in vector.specs}
        self._parameters = {n: p for n, p in module.named_parameters() if n in changed}
        self._starts: dict[str, torch.Tensor] = {}
        self._deltas: dict[str, torch.Tensor] = {}
        for name, parameter in self._parameters.items():
            deltas = torch.stack(
                [
                    v[name] if name in v.specs else torch.zeros(parameter.shape)
                    for v in vectors.values()
                ]
            )
            if bool(deltas.any()):
                self._deltas[name] = deltas.to(parameter.device, torch.float32)
                self._starts[name] = parameter.detach().clone()
        if not self._deltas:
            raise OptionError("the task vectors change nothing that the model has as a parameter")
        width = len(self._deltas) if per == "tensor" else 1
        self.lambdas = nn.Parameter(torch.full((len(vectors), width), START))
        self._column = {name: i if per == "tensor" else 0 for i, name in enumerate(self._deltas)}

    @without_gradients
    def set(self) -> None:
        """Set the parameters to the present sum."""
        for name, deltas in self._deltas.items():
            weights = self.lambdas[:, self._column[name]].to(deltas.device)
            change = torch.tensordot(weights, deltas, dims=1)
            self._parameters[name].copy_(self._starts[name] + change)

    @without_gradients
    def _take_gradient(self, name: str, parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        products = (self._deltas[name] * parameter.grad.float()).flatten(1).sum(1).cpu()
        assert self.lambdas.grad is not None
        self.lambdas.grad[:, self._column[name]] += products
        parameter.grad = None

    @contextmanager
    def differentiated(self, module: nn.Module) -> Iterator[None]:
        """Let gradients flow to the sum's parameters alone, and restore all of it at the end."""
        before = {name: parameter.requires_grad for name, parameter in module.named_parameters()}
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name in self._deltas)
        handles = [
            self._parameters[name].register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                partial(self._take_gradient, name)
            )
            for name in self._deltas
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            with torch.no_grad():
                for name, start in self._starts.items():
                    self._parameters[name].copy_(start)
            for name, parameter in module.named_parameters():
                parameter.requires_grad_(before[name])

    def coefficients(self, vectors: Vectors) -> Coefficients:
        """Return the coefficients by task and tensor; tensors without one have the mean."""
        found = {}
        for vector, row in zip(vectors, self.lambdas.detach(), strict=True):
            values = {name: float(row[i]) for name, i in self._column.items()}
            mean = float(row.mean())
            found[vector] = {name: values.get(name, mean) for name in vectors[vector].specs}
        return found


def descend(
    session: EditSession, vectors: Vectors, tasks: Sequence[Task], options: Descent
) -> Coefficients:
    """Find the coefficients that make a loss small on images of all tasks.

    The loss is the mean over tasks of the entropy of the predictions, for which no labels are
    needed (AdaMerging, arXiv 2310.02575), or of the cross-entropy (learned soups, arXiv 2203.05482,
    without the constraint that coefficients sum to 1). Memory holds the base, the vectors and one
    model.

    Args:
        session: the session with the model, which is the base again at the end.
        vectors: task -> task vector.
        tasks: the tasks, in the order of their vectors.
        options: how to search.

    Raises:
        OptionError: if the vectors change no parameter.
        NonfiniteError: if the loss becomes NaN or infinite.
    """
    if session.scoring is not IMAGES:
        raise OptionError(
            f"search {options.loss} takes tasks of images", hint="race, grid or cma takes texts"
        )
    model = session.model
    session.base.load_into(model.module)
    model.module.eval()
    heads = {task: model.zero_shot_head(task) for task in tasks}
    orders = {task: _order(session, task, options) for task in tasks}
    total = _Sum(model.module, vectors, options.per)
    optimizer = torch.optim.Adam([total.lambdas], lr=options.lr)
    with total.differentiated(model.module):
        for step in range(options.steps):
            total.set()
            total.lambdas.grad = torch.zeros_like(total.lambdas)
            for task in tasks:
                indices = next(orders[task])
                pixels = model.pixels(task, options.on)
                logits = model.encode_image(pixels.batch(indices)) @ heads[task].T
                labels = pixels.labels[torch.from_numpy(indices)].to(logits.device)
                loss = _loss(logits, labels, options.loss) / len(tasks)
                value = float(loss.detach())
                if not math.isfinite(value):
                    raise NonfiniteError(
                        f"the {options.loss} of {task.name} is {value} at step {step}",
                        hint="lower search_lr=",
                    )
                loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return total.coefficients(vectors)


def _loss(logits: torch.Tensor, labels: torch.Tensor, kind: Loss) -> torch.Tensor:
    if kind == "loss":
        return F.cross_entropy(logits, labels)
    logs = logits.log_softmax(-1)
    return -(logs.exp() * logs).sum(-1).mean()


def _order(
    session: EditSession, task: Task, options: Descent
) -> Iterator[np.ndarray[tuple[int], np.dtype[np.int64]]]:
    """Yield batches of indices of a task's images, in a new order when all have been used."""
    size = len(session.model.pixels(task, options.on))
    generator = np.random.default_rng(seed_of("descent", options.seed, task.name))
    while True:
        order = generator.permutation(size)
        for start in range(0, max(size - BATCH + 1, 1), BATCH):
            yield order[start : start + BATCH]


def scaled(vectors: Vectors, coefficients: Mapping[str, Mapping[str, float]]) -> Vectors:
    """Return the vectors multiplied by coefficients by tensor."""
    return {
        task: vector * {escape(name): value for name, value in coefficients[task].items()}
        for task, vector in vectors.items()
    }
