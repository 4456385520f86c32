"""Try the values that a recipe gives a method, before any model is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from weightops.algebra.linear_form import LinearForm
from weightops.algebra.names import Each, PerTensor
from weightops.checkpoints.checkpoint import Checkpoint
from weightops.errors import OptionError
from weightops.merging.merge import merge
from weightops.merging.methods.table import METHODS
from weightops.statistics.statistic import statistic_source
from weightops.support.lazy import torch

if TYPE_CHECKING:
    from weightops.merging.recipe import Recipe

_NAME, _SIZE = "any tensor", 8


def try_values(recipe: Recipe) -> None:
    """Merge small random tensors as a recipe says, whose values are of all tensors.

    Values by tensor are checked when these are merged: which of them meet isn't known here.

    Raises:
        OptionError: for a value that the method refuses.
    """
    given = [*recipe.options.values(), *(recipe.weights or ())]
    if not given or any(map(_differs, given)):  # defaults can be
        return
    method, generator = METHODS[recipe.method], torch.Generator().manual_seed(0)
    base, *models = (
        {_NAME: torch.randn(_SIZE, _SIZE, generator=generator)}
        for _ in range(1 + len(recipe.models))
    )
    kinds = {"gram": torch.eye(_SIZE), "fisher": torch.ones(_SIZE, _SIZE)}
    own = {
        kind: Checkpoint(
            LinearForm.of(statistic_source({_NAME: kinds[kind]}, kind, {"kind": kind}))
        )
        for kind in method.statistics
    }
    try:
        merge(
            models,
            method,
            base=base if recipe.base or method.space == "delta" else None,
            weights=recipe.weights,
            statistics=[own] * len(models) if own else None,
            **recipe.options,
        ).state_dict()
    except OptionError:
        raise
    except Exception:  # whatever else a method raises is of these tensors, not of the values
        return


def _differs(value: PerTensor) -> bool:
    """Return whether a value isn't the same for all tensors."""
    if isinstance(value, Each):
        return any(map(_differs, value))
    return isinstance(value, (Mapping, list, tuple))
