"""`Statistic`: what a model does to data, as named tensors with a record of their origin."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property
from typing import Any, Literal

from weightops.algebra.kernels import has_nonfinite
from weightops.algebra.linear_form import LinearForm
from weightops.checkpoints.checkpoint import Checkpoint
from weightops.checkpoints.formats.memory import MemorySource
from weightops.checkpoints.opening import CheckpointLike, open_checkpoint
from weightops.checkpoints.statistic_record import RECORD, record_of
from weightops.checkpoints.training_record import training_record
from weightops.errors import MismatchError, NonfiniteError, SpaceError
from weightops.support.lazy import torch
from weightops.support.text import portable

Kind = Literal["fisher", "gram"]


def statistic_source(
    tensors: Mapping[str, torch.Tensor], ref: str, record: Mapping[str, Any]
) -> MemorySource:
    """Return the tensors of a statistic in memory, with a record of the model and data."""
    return MemorySource(tensors, ref, record={RECORD: dict(record)})


class Statistic:
    """One model's statistic of one kind.

    Args:
        given: a file of `collect`, its result, or tensors by name.
        kind: the kind that is needed.

    Raises:
        MismatchError: if it is of another kind, or in half precision.
        SpaceError: if it is a model.
    """

    def __init__(self, given: CheckpointLike, kind: Kind) -> None:
        self.checkpoint = open_checkpoint(given)
        self.kind, self.record = kind, record_of(self.checkpoint)
        own = self.record.get("kind", kind)
        again = f"`weightops statistics --kind {kind}` makes one"
        if own != kind:
            raise MismatchError(
                f"{self.ref} is a {own} statistic, and a {kind} is needed", hint=again
            )
        if self.checkpoint.architecture is not None:
            raise SpaceError(f"{self.ref} holds weights, not a {kind} statistic", hint=again)
        narrow = [n for n, s in self.checkpoint.specs.items() if s.dtype_name not in _WIDE]
        if narrow:
            dtype = self.checkpoint.specs[narrow[0]].dtype_name
            raise MismatchError(
                f"{self.ref} holds {narrow[0]} in {dtype}, and a statistic needs float32 or "
                "float64",
                hint=again,
            )

    def check_values(self, tensor: torch.Tensor) -> None:
        """Refuse values of a tensor that no statistic of this kind has.

        Raises:
            NonfiniteError: for NaN and infinities.
            MismatchError: for a negative Fisher information, or a Gram matrix that isn't symmetric
                or has negative squares.
        """
        hint = f"collect it again: `weightops statistics --kind {self.kind}`"
        if has_nonfinite(tensor):
            raise NonfiniteError(f"{self.ref} holds NaN or Inf", hint=hint)
        squares = tensor if self.kind == "fisher" else tensor.diagonal(dim1=-2, dim2=-1)
        wrong = "negative squares" if squares.numel() and bool(squares.min() < 0) else ""
        if self.kind == "gram" and not wrong:
            most = _UNEQUAL * float(squares.max())
            wrong = "" if _asymmetry(tensor) <= most else "no symmetric matrix"
        if wrong:
            raise MismatchError(
                f"{self.ref} holds {wrong}, and is no {self.kind} statistic", hint=hint
            )

    @property
    def ref(self) -> str:
        """The name of the statistic in messages."""
        return self.checkpoint.ref

    @property
    def form(self) -> LinearForm:
        """The lazy expression of its tensors."""
        return self.checkpoint.form

    @cached_property
    def input_first(self) -> frozenset[str]:
        """The weights whose first dimension is the input of their map."""
        return frozenset(self.record.get("input_first", ()))

    def check_model(self, model: Checkpoint) -> None:
        """Refuse a model that the statistic isn't of, or on whose task it isn't, as far as known.

        Raises:
            MismatchError: naming both.
        """
        of = self.record.get("model")
        if of and of["fingerprint"] != model.fingerprint:
            raise MismatchError(
                f"{self.ref} is a statistic of {of['ref']} ({of['fingerprint']}), not of "
                f"{model.ref} ({model.fingerprint})",
                hint="name each model's own statistic, in the order of the models",
            )
        learnt, task = (training_record(model) or {}).get("task"), self.record.get("task")
        if learnt and task and _words(learnt).isdisjoint(_words(task)):
            raise MismatchError(
                f"{self.ref} is a statistic of {model.ref} on {task}, and the model has learnt "
                f"{learnt}",
                hint=f"collect it on {learnt}",
            )

    def describe(self) -> dict[str, object]:
        """Return what identifies the statistic in the provenance of a merge."""
        return {
            "kind": self.kind,
            "ref": portable(self.ref),
            "fingerprint": self.checkpoint.fingerprint,
        }


def _words(task: str) -> set[str]:
    """Return the names of the tasks that a task is made of, and what was made of them."""
    return set(re.split("[+:/]", task))


_UNEQUAL = 1e-3
"""The most by which a Gram matrix may differ from its transpose, as a share of its largest square.
"""

_BLOCK = 128
"""Rows that are compared with columns at a time: as many as a cache holds."""


def _asymmetry(matrices: torch.Tensor) -> float:
    """Return how far elements of matrices, shape ``(..., d, d)``, are from their mirror images."""
    parts = (
        matrices[..., i : i + _BLOCK, i:] - matrices[..., i:, i : i + _BLOCK].mT
        for i in range(0, matrices.shape[-1], _BLOCK)
    )
    return max((float(part.abs().max()) for part in parts if part.numel()), default=0.0)


_WIDE = ("float32", "float64")
