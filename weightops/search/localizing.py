"""Find the few elements of a task vector that a task needs: masks that are learned from images."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

from weightops.algebra.dtypes import accumulator_name
from weightops.algebra.source import Spec
from weightops.checkpoints.checkpoint import Checkpoint
from weightops.checkpoints.kinds import kind_of
from weightops.checkpoints.matching import match_names
from weightops.errors import CheckpointError, OptionError, SpaceError
from weightops.search.descent import Changes, Descent, check_images, follow
from weightops.search.session import EditSession
from weightops.support.arguments import check_arguments
from weightops.support.lazy import torch
from weightops.support.ranges import Range
from weightops.task_vector import TaskVector
from weightops.tasks.table import TaskLike, as_task

START = 3.0
"""The score of an element that the mask has at first; that of others is the negative of it."""

RECORD = "localized"
"""The key of the record in the provenance of a vector that a mask was learned for."""


class _Mask(Changes):
    """The change ``sigmoid(S) * tau``, with a score S for each element.

    Args:
        session: the session with the model, which gets the weights of the base.
        vector: the task vector tau.
        density: the fraction of the changed elements that the mask has at first, the largest.
        penalty: the weight of the mean of ``sigmoid(S)`` in the loss.
    """

    def __init__(
        self, session: EditSession, vector: TaskVector, density: float, penalty: float
    ) -> None:
        super().__init__(session, {"": vector}, "train")
        sizes = torch.cat([deltas[deltas != 0].abs() for deltas in self._deltas.values()])
        first = max(round(density * len(sizes)), 1)
        least = sizes.kthvalue(len(sizes) - first + 1).values
        self.scores = {
            name: torch.where(deltas[0].abs() >= least, START, -START)
            for name, deltas in self._deltas.items()
        }
        self.searched = list(self.scores.values())
        self.changed, self._penalty = len(sizes), penalty

    def change(self, name: str) -> torch.Tensor:
        return self.scores[name].sigmoid().mul_(self._deltas[name][0])

    def take_gradient(self, name: str, gradient: torch.Tensor) -> None:
        scores = self.scores[name]
        share = scores.sigmoid()
        assert scores.grad is not None
        # Times the number of elements: a share of one is too small beside Adam's epsilon.
        slope = gradient.mul_(self._deltas[name][0]).mul_(self.changed).add_(self._penalty)
        scores.grad += slope * share * (1 - share)


def localize(
    vector: TaskVector,
    task: TaskLike,
    *,
    penalty: Annotated[float, Range(min=0)] = 1.0,
    density: Annotated[float, Range(min=0, max=1)] = 0.05,
    images: Annotated[int, Range(min=1)] = 256,
    search_steps: Annotated[int, Range(min=1)] = 100,
    search_lr: Annotated[float, Range(min=0)] = 0.1,
    seed: Annotated[int, Range(min=0)] = 0,
    device: str = "auto",
) -> TaskVector:
    """Return a task vector with only the elements that its task needs (Localize-and-Stitch).

        S = argmin loss(base + sigmoid(S) tau) + penalty mean(sigmoid(S))
        localized = tau where S > 0, else 0

    S has a number for each element that the vector changes. Adam finds it on labelled training
    images. Tensors that no gradient moves, such as running statistics or those of a text encoder,
    stay whole. The method `localize_and_stitch` with ``density=1`` merges such vectors.

    Source: arXiv 2408.13656.

    Args:
        vector: the task vector, of a model that is told images by.
        task: the task that the mask is learned for.
        penalty: the weight of the mask's mean in the loss: the larger, the fewer elements stay.
        density: the fraction of the elements that the mask has at first, the largest ones.
        images: the most training images to learn it from, the first ones in a fixed random order.
        search_steps: steps of Adam for the mask, with 16 images each.
        search_lr: the learning rate of Adam for the mask.
        seed: the seed of the order of the images.
        device: where to learn it: auto, cpu, cuda, cuda:1, ...

    Returns:
        The vector, in memory. `TaskVector.save` writes how it was made, too.

    Raises:
        SpaceError: if it isn't a task vector.
        CheckpointError: if the vector doesn't hold its base.
        OptionError: if the vector changes no parameter, or no element stays.
        NonfiniteError: if the loss becomes NaN or infinite.

    >>> import weightops
    >>> base = weightops.open_checkpoint("embedded")
    >>> finetuned = {n: t * 1.01 if t.is_floating_point() else t for n, t in base.items()}
    >>> vector = TaskVector(base, finetuned)
    >>> sparse = localize(vector, "mnist", penalty=9, images=16, search_steps=1, device="cpu")
    >>> 0 < sparse.norm() < vector.norm()
    True
    """
    check_arguments(
        localize,
        penalty=penalty,
        density=density,
        images=images,
        search_steps=search_steps,
        search_lr=search_lr,
        seed=seed,
    )
    if not isinstance(vector, TaskVector):
        raise SpaceError(
            f"{kind_of(vector)} was given where a task vector is needed",
            hint="TaskVector(base, finetuned)",
        )
    base = vector.base.checkpoint if vector.base else None
    if base is None:
        raise CheckpointError(
            f"{vector!r} doesn't hold its base, which a mask is learned on",
            hint="TaskVector(base, finetuned) does",
        )
    learned, vector = as_task(task), _unrounded(vector)
    session = EditSession(base, [learned], device=device, precision="float32")
    check_images(session, "localize", "localize_and_stitch without a mask takes other models")
    own = session.vector(vector)
    mask = _Mask(session, own, density, penalty)
    options = Descent("loss", "tensor", "train", search_steps, search_lr, seed, images)
    follow(session, mask, [learned], options)
    chosen = {name: (scores > 0).cpu() for name, scores in mask.scores.items()}
    kept = {n: t * chosen[n] if n in chosen else t for n, t in own.items()}
    left = sum(int(kept[name].count_nonzero()) for name in chosen)
    if not left:
        raise OptionError(f"no element of {vector!r} stays", hint="lower penalty=")
    record = {
        "task": learned.name,
        "split": "train",
        **learned.reading("train"),
        "images": min(images, len(session.model.pixels(learned, "train"))),
        "penalty": penalty,
        "density": density,
        "steps": search_steps,
        "lr": search_lr,
        "seed": seed,
        "kept": left / mask.changed,
    }
    named = match_names(Checkpoint(session.in_memory(kept, "kept").form), Checkpoint(vector.form))
    found = dict(TaskVector.of_form(named, vector.base))
    sparse = session.in_memory(found, f"{learned.name} localized", {RECORD: record})
    return TaskVector.of_form(sparse.form, vector.base)


def _unrounded(vector: TaskVector) -> TaskVector:
    """Return a vector in float32 at least: half precision would round differences."""
    form = vector.form
    specs = {name: Spec(s.shape, accumulator_name(s.dtype_name)) for name, s in form.specs.items()}
    return TaskVector.of_form(replace(form, specs=specs), vector.base)
