"""Measure edits on a growing number of validation images, until something newer is asked for."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import TypeAlias

from weightops.evaluation.scoring import Order
from weightops.search.goal import Coefficients
from weightops.search.session import EditSession, Vectors, weighted_sum
from weightops.support.lazy import torch
from weightops.tasks.task import Task

Guesses: TypeAlias = "dict[str, torch.Tensor]"
"""Task -> the guess for each of its first images."""

FIRST, GROWTH, PIECE = 16, 4, 64
"""Images of each task in the first look, how much larger the next one is, and images at a time."""

_KEPT = 256
"""The largest number of edits whose guesses are kept."""


class Glimpses:
    """The guesses of edits on the first images, in a fixed random order, of each task.

    Args:
        session: the session with the model and the tasks.
        vectors: the vectors by name.
        images: the most images of each task.

    Attributes:
        session: the session.
        vectors: the vectors by name.
        orders: task -> indices of its images, in the order in which they are looked at.
    """

    def __init__(self, session: EditSession, vectors: Vectors, images: int) -> None:
        self.session, self.vectors = session, vectors
        self.orders: dict[str, Order] = {t.name: session._order(t)[:images] for t in session.tasks}
        self._kept: OrderedDict[Coefficients, Guesses] = OrderedDict()
        self._set_to: Coefficients | None = None

    def set_to(self, alpha: Coefficients) -> None:
        """Set the model in memory to an edit."""
        if self._set_to != alpha:
            self._set_to = None
            self.session._set(weighted_sum(self.vectors, alpha))
            self._set_to = alpha

    def look(self, alpha: Coefficients, goes_on: Callable[[], bool]) -> Iterator[Guesses]:
        """Yield the guesses of an edit on ever more images, as long as ``goes_on()`` is true.

        What has been seen of an edit is kept, and looked at no second time.

        Raises:
            NonfiniteError: if the edit's logits aren't finite.
        """
        seen = self._kept.setdefault(alpha, {})
        self._kept.move_to_end(alpha)
        if len(self._kept) > _KEPT:
            self._kept.popitem(last=False)
        if seen:
            yield dict(seen)
        stop = FIRST
        while any(len(seen.get(name, ())) < len(order) for name, order in self.orders.items()):
            new = False
            for task in self.session.tasks:
                while len(seen.get(task.name, ())) < min(stop, len(self.orders[task.name])):
                    if not goes_on():
                        return
                    self._look_at(task, alpha, seen, stop)
                    new = True
            if new:
                yield dict(seen)
            stop *= GROWTH

    def _look_at(self, task: Task, alpha: Coefficients, seen: Guesses, stop: int) -> None:
        """Look at the next images of a task."""
        self.set_to(alpha)
        start = len(seen.get(task.name, ()))
        images = self.orders[task.name][start : min(stop, start + PIECE)]
        new = self.session._outcomes(task, "validation", images)[:, 0]
        seen[task.name] = torch.cat([seen[task.name], new]) if start else new
