"""Models with their units in the order of another model's."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from threading import Lock

from weightops.algebra.linear_form import LinearForm, check_match, tied_names
from weightops.algebra.provenance import provenance
from weightops.algebra.scratch import Scratch
from weightops.algebra.source import ExpressionSource, Source, cut, flattened
from weightops.checkpoints.checkpoint import Checkpoint
from weightops.checkpoints.in_memory import InMemory
from weightops.checkpoints.linearized import linearized_at
from weightops.errors import CheckpointError
from weightops.merging.alignment.axes import find_axes
from weightops.merging.alignment.matching import Orders, match_weights, permuted
from weightops.support.lazy import torch


def align(model: Checkpoint, reference: Checkpoint) -> Checkpoint:
    """Return a model with its units permuted to be like those of a reference.

    The function that the model computes stays the same: what gives units and what reads them
    permute together. Units are the hidden ones of each MLP or block, the heads of attention and the
    units within them, and the stream that blocks add to. The permutations are found when the first
    tensor is read: those that bring the weights nearest to the reference's (weight matching of Git
    Re-Basin, arXiv 2209.04836).

    Args:
        model: a model in the names of the reference; see `open_matched`.
        reference: the model whose units are the order.

    Raises:
        MismatchError: if the models differ in names or shapes, or nothing says which axes of theirs
            permute together.
        CheckpointError: if a model is linearised: permuted, it isn't at its base any more.
    """
    for one in (model, reference):
        if linearized_at(one.form) is not None:
            raise CheckpointError(
                f"{one.ref} is linearised, and its units have those of its base beside them",
                hint="leave out align: vectors of one base are in one order",
            )
    check_match(reference.form, model.form)
    own = InMemory(model.form, reference.names_in_memory)
    aligned = Aligned(own.form, reference)
    return model.with_form(LinearForm.of(own.in_files(aligned)), model.architecture)


class Aligned(ExpressionSource):
    """A model's tensors with their axes permuted to be like those of a reference.

    Args:
        form: the model in the names that its module has in memory.
        reference: the model whose units are the order.
    """

    def __init__(self, form: LinearForm, reference: Checkpoint) -> None:
        self._form, self._reference = form, reference
        self.ref = " + ".join(source.ref for source in form.sources)
        self.specs, self.ties = form.specs, tied_names(form)
        self.files = form.files
        self._axes = find_axes(reference, form.specs)
        self._lock = Lock()

    @cached_property
    def _orders(self) -> Orders:
        return match_weights(
            self._axes,
            Checkpoint(self._reference.memory.form).__getitem__,
            Checkpoint(self._form).__getitem__,
        )

    def open(self, name: str, scratch: Scratch) -> Callable[[int, int], torch.Tensor]:
        with self._lock:
            orders = self._orders
        tensor = permuted(Checkpoint(self._form)[name], self._axes.labels[name], orders)
        flat = flattened(tensor)
        return lambda start, stop: cut(flat, start, stop)

    @property
    def leaves(self) -> list[Source]:
        return list(dict.fromkeys([*self._form.leaves, *self._reference.form.leaves]))

    def working_bytes(self, name: str) -> int:
        return 2 * self.specs[name].nbytes

    def describe(self) -> dict[str, object]:
        """Return the provenance of the model and of the one that it is aligned to."""
        return {"aligned": provenance(self._form), "to": provenance(self._reference.form)}
