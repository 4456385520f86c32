"""Find by gradient what of task vectors to add: coefficients, or singular directions, too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from weightops.algebra.names import layer_of
from weightops.errors import OptionError
from weightops.search.descent import Descent, WeightedSum, check_images, follow, scaled
from weightops.search.session import EditSession, Vectors
from weightops.support.lazy import torch
from weightops.tasks.task import Split, Task

TAKEN = 0.1
"""The score that each direction has at first, as AdaRank has it; those above 0 are taken."""


class _Directions(WeightedSum):
    """The sum of ``lambda_i U_i (S_i > 0) Sigma_i V_i'``, with scores S_i of the directions.

    Scores have the gradient that ``sigmoid(S_i)`` in place of the step would have, at the value of
    the step (straight through). Matrices of the layers are decomposed; other tensors are added.

    Args:
        session: the session with the model, which gets the weights of the base.
        vectors: the task vectors.
        on: the split whose images are used.

    Attributes:
        scores: tensor -> scores of each task's directions, shape ``(k, r)``.
    """

    def __init__(self, session: EditSession, vectors: Vectors, on: Split) -> None:
        super().__init__(session, vectors, on, "tensor")
        matrices = [n for n, d in self._deltas.items() if d.dim() == 3 and layer_of(n)]
        if not matrices:
            raise OptionError("the task vectors change no matrix of a layer")
        self._parts = {
            name: torch.linalg.svd(self._deltas[name], full_matrices=False) for name in matrices
        }
        self.scores = {name: torch.full_like(s, TAKEN) for name, (_, s, _) in self._parts.items()}
        self.searched = [*self.searched, *self.scores.values()]

    def vector(self, name: str) -> torch.Tensor:
        """Return the tasks' changes of a parameter, each times its lambda, shape ``(k, ...)``."""
        deltas = self._deltas[name]
        if name in self._parts:
            u, s, vh = self._parts[name]
            deltas = (u * (s * (self.scores[name] > 0))[:, None]) @ vh
        return deltas * self.weights(name).view(-1, *[1] * (deltas.dim() - 1))

    def change(self, name: str) -> torch.Tensor:
        return self.vector(name).sum(0)

    def take_gradient(self, name: str, gradient: torch.Tensor) -> None:
        if name not in self._parts:
            super().take_gradient(name, gradient)
            return
        u, s, vh = self._parts[name]
        along = ((u.mT @ gradient) * vh).sum(-1) * s
        scores = self.scores[name]
        share = scores.sigmoid()
        assert scores.grad is not None
        scores.grad += along * self.weights(name)[:, None] * share * (1 - share)
        self.add_products(name, (along * (scores > 0)).sum(1))


def search_by_gradient(
    session: EditSession, vectors: Vectors, tasks: Sequence[Task], options: Descent
) -> tuple[Vectors, Mapping[str, Any]]:
    """Find what to add of task vectors, so that a loss is small on images of all tasks.

    The loss is the mean over tasks of the entropy of the predictions, for which no labels are
    needed (AdaMerging, arXiv 2310.02575), or of the cross-entropy (learned soups, arXiv 2203.05482,
    without the constraint that coefficients sum to 1). Coefficients are found; with
    ``per="direction"``, each singular direction of a task's matrices is taken or left, too
    (AdaRank, arXiv 2503.22178). Memory holds the base, the vectors and one model.

    Args:
        session: the session with the model, which is the base again at the end.
        vectors: task -> task vector.
        tasks: the tasks, in the order of their vectors.
        options: how to search.

    Returns:
        The vectors to add, and entries of a summary: the ``coefficients`` by task and tensor, or
        the number of ``directions`` that are taken.

    Raises:
        OptionError: for tasks of texts, or if the vectors change no parameter.
        NonfiniteError: if the loss becomes NaN or infinite.
    """
    check_images(session, f"search {options.loss}", "race, grid or cma takes texts")
    if options.per != "direction":
        total = WeightedSum(session, vectors, options.on, options.per)
        follow(session, total, tasks, options)
        coefficients = total.coefficients(vectors)
        return scaled(vectors, coefficients), {"coefficients": coefficients}
    found = _Directions(session, vectors, options.on)
    follow(session, found, tasks, options)
    chosen, taken = {}, {}
    for i, (task, vector) in enumerate(vectors.items()):
        own = dict(vector * found.mean(i))
        own |= {name: found.vector(name)[i].cpu() for name in found.names if name in own}
        chosen[task] = session.in_memory(own, f"directions of {task}")
        taken[task] = {name: int((s[i] > 0).sum()) for name, s in found.scores.items()}
    return chosen, {"directions": taken}
