"""Options that several verbs borrow from the library, and how their values are put together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from weightops.cli.from_signature import Borrowed
from weightops.cli.signatures import Parameter, read

if TYPE_CHECKING:
    from weightops.search.strategies import SearchOptions
    from weightops.training.config import TrainingConfig

_CONFIG_FOR = "weightops.training.config:config_for"


@dataclass(frozen=True)
class BorrowedTraining(Borrowed):
    """The parameters of `config_for`, in the ranges that `TrainingConfig` declares."""

    def parameters(self) -> list[Parameter]:
        fields = read("weightops.training.config:TrainingConfig").parameters
        kinds = {parameter.name: parameter.kind for parameter in fields}
        return [replace(p, kind=kinds.get(p.name, p.kind)) for p in super().parameters()]


TRAINING = BorrowedTraining(_CONFIG_FOR, only=("steps", "batch_size", "lr", "seed"))
TRAINING_AND_EMA = BorrowedTraining(_CONFIG_FOR, only=(*TRAINING.only, "ema"))
FINETUNING = BorrowedTraining(_CONFIG_FOR, only=(*TRAINING_AND_EMA.only, "linearized"))
SEARCH = Borrowed(
    "weightops.search.strategies:SearchOptions",
    names={"strategy": "search"},
    shown_defaults={"alphas": "0:1:0.05"},
)


SCORED = Borrowed("weightops.tasks.table:as_read", only=("score",))


def taken(given: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Remove some of the given values, and return them."""
    return {name: given.pop(name) for name in names if name in given}


def training_config(model: Any, given: dict[str, Any]) -> TrainingConfig:
    """Return the recipe for a model, of the given values, which are removed."""
    from weightops.training.config import config_for

    return config_for(model, **taken(given, FINETUNING.only))


def search_options(given: dict[str, Any]) -> SearchOptions:
    """Return the options of a search, of the given values, which are removed."""
    from weightops.search.strategies import SearchOptions

    values = taken(given, ("alphas", "search"))
    if "search" in values:
        values["strategy"] = values.pop("search")
    return SearchOptions(**values)
