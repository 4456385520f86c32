"""Weights of linearised models: which base they are linearised at, and where they may go.

A linearised model computes ``f(x; theta_0) + J(x; theta_0) (theta - theta_0)`` (arXiv 2305.12827).
Its weights have the names and shapes of the model itself, which computes something else with them.
"""

from __future__ import annotations

from typing import NamedTuple

from weightops.algebra.linear_form import LinearForm, describe
from weightops.algebra.source import Source
from weightops.errors import CheckpointError, MismatchError
from weightops.support.lazy import nn
from weightops.support.text import first_few, portable


class Linearized(NamedTuple):
    """The base that weights are linearised at.

    Attributes:
        ref: its name.
        fingerprint: what identifies its weights.
        source: its weights, if they are part of the expression.
    """

    ref: str
    fingerprint: str
    source: Source | None = None

    @property
    def record(self) -> dict[str, str]:
        """The entry of a provenance record that says so."""
        return {"ref": portable(self.ref), "fingerprint": self.fingerprint}


def linearized_at(form: LinearForm) -> Linearized | None:
    """Return the base that weights or deltas are linearised at; None for ordinary ones.

    Raises:
        MismatchError: if some of what they are made of are linearised at another base, or not.
    """
    leaves = form.leaves
    records = [leaf.linearized_at for leaf in leaves if leaf.linearized_at]
    if not records:
        return None
    found = {record["fingerprint"]: record["ref"] for record in records}
    others = [leaf for leaf in leaves if not leaf.linearized_at]
    bases = [leaf for leaf in others if leaf.fingerprint in found]
    if len(found) > 1 or len(bases) < len(others):
        ordinary = [leaf.ref for leaf in others if leaf not in bases]
        rest = f", and {first_few(ordinary)} isn't" if ordinary else ""
        raise MismatchError(
            f"{describe(form)} has weights that are linearised at {' and at '.join(found.values())}"
            f"{rest}",
            hint="combine vectors that `finetune --linearized` made from one base",
        )
    [(fingerprint, ref)] = found.items()
    return Linearized(ref, fingerprint, bases[0] if bases else None)


def mark(module: nn.Module, at: Linearized) -> None:
    """Note that a module runs linearised, so that it takes such weights."""
    module.linearized_at = at.fingerprint  # type: ignore[assignment]


def check_taken_by(module: nn.Module, form: LinearForm) -> None:
    """Refuse weights of a linearised model for a module that doesn't run so.

    Raises:
        CheckpointError: naming the weights and their base.
    """
    at = linearized_at(form)
    if at is not None and getattr(module, "linearized_at", None) != at.fingerprint:
        raise CheckpointError(
            f"{describe(form)} has weights of a model that is linearised at {at.ref}: its module "
            "computes something else with them",
            hint="`weightops evaluate`, `add` and `negate` run the linearised model; in Python, "
            "ImageModel.open(...) does",
        )
