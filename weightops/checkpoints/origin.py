"""The base that a task vector was made from."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from weightops.algebra.linear_form import LinearForm
from weightops.algebra.same_bits import same_weights
from weightops.checkpoints.checkpoint import Checkpoint
from weightops.checkpoints.matching import check_config, is_renamed, match_to_base
from weightops.errors import MismatchError
from weightops.support.text import portable

log = logging.getLogger("weightops")


class Origin:
    """The base that a task vector was made from: its name and fingerprint, and perhaps its weights.

    Args:
        ref: the name of the base.
        recorded: the fingerprint that a file says, or None to compute it from the weights.
        checkpoint: the weights, or None.
    """

    def __init__(self, ref: str, recorded: str | None, checkpoint: Checkpoint | None) -> None:
        self.ref, self.recorded, self.checkpoint = ref, recorded, checkpoint

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Origin:
        """Return the origin of vectors that are made from a checkpoint."""
        return cls(checkpoint.ref, None, checkpoint)

    @classmethod
    def of_record(cls, record: object) -> Origin | None:
        """Return the origin that `describe` has described, or None if it has not."""
        if not isinstance(record, Mapping) or not {"ref", "fingerprint"} <= record.keys():
            return None
        return cls(record["ref"], record["fingerprint"], None)

    def describe(self) -> dict[str, str]:
        """Return name and fingerprint for metadata."""
        return {"ref": portable(self.ref), "fingerprint": self.fingerprint}

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the base's weights."""
        if self.recorded is not None:
            return self.recorded
        assert self.checkpoint is not None
        return self.checkpoint.fingerprint

    def start_at(self, base: Checkpoint, vector: LinearForm, *, strict: bool) -> LinearForm:
        """Return the weights that a vector of this origin is added to, in the names of a base.

        If the base is this origin, they are the origin's own weights, not the same ones in another
        place, because only then do coefficients cancel exactly.

        Args:
            base: the model to edit.
            vector: the vector, whose names this origin has.
            strict: refuse a base that isn't this origin, instead of warning.

        Raises:
            MismatchError: if the base isn't this origin, or is configured differently, and
                ``strict=True``.
        """
        if self.checkpoint is not None and self.checkpoint is not base:
            check_config(base, self.checkpoint, strict=strict)
        own = match_to_base(self.checkpoint, base) if self.checkpoint else None
        if Origin(self.ref, self.recorded, own).matches(base):
            return own.form if own else base.form
        if own is None and is_renamed(base, vector, self.fingerprint):
            return base.form
        message = (
            f"this task vector was made from {self.ref} ({self.fingerprint}) "
            f"and is applied to {base.ref} ({base.fingerprint})"
        )
        if strict:
            raise MismatchError(
                message,
                hint="the same weights in another dtype are another base: convert them back",
            )
        log.warning(message)
        return base.form

    def matches(self, other: Checkpoint) -> bool:
        """Return True if a checkpoint is this base: the same place, or the same bits."""
        if other is self.checkpoint:
            return True
        if self.checkpoint is not None:
            mine, theirs = self.checkpoint.form, other.form
            if len(mine.terms) == len(theirs.terms) == 1 and mine.base and theirs.base:
                same_specs = dict(mine.specs) == dict(theirs.specs)
                return same_weights(mine.base, theirs.base) and same_specs
        return self.fingerprint == other.fingerprint

    @staticmethod
    def common(a: Origin | None, b: Origin | None) -> Origin | None:
        """Return the base that two vectors have in common, or None if they have none."""
        if a is None or b is None:
            return None
        if a is b:
            return a
        if a.checkpoint and b.checkpoint:
            if a.matches(b.checkpoint):
                return a
        elif a.fingerprint == b.fingerprint:
            return a if a.checkpoint else b
        return None

    @staticmethod
    def checkpoint_of(origin: Origin | None, delta: LinearForm) -> Checkpoint:
        """Return deltas as a checkpoint of the model that they were made from, if it is there."""
        own = origin.checkpoint if origin else None
        return own.with_form(delta, own.architecture) if own else Checkpoint(delta)
