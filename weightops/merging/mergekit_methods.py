"""The merge methods of mergekit in terms of weightops: their parameters, and what these become."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

Scope = Literal["needed", "first", "ordinary", "optional"]


class Flag(NamedTuple):
    """A parameter that is true or false.

    Attributes:
        default: mergekit's default.
        option: the option of the method that it becomes, or "" if it changes no result.
        choices: the values of the option for False and True.
    """

    default: bool
    option: str = ""
    choices: tuple[Any, Any] = (False, True)


@dataclass(frozen=True)
class Translation:
    """A merge method of mergekit 0.1.5 in terms of weightops.

    Attributes:
        method: the method of weightops.
        shared: parameters for all models -> option of the method.
        each: parameters that each model may have of its own -> option of the method.
        fixed: options that are always set.
        defaults: parameter -> mergekit's default, where it isn't the option's.
        weight: True if each model needs a weight.
        flags: parameters for all models that are true or false.
        others: the number of models beside the base, where it is fixed.
        fewest: the least number of models beside the base.
        base: the part of base_model: the base of the task vectors, "needed" or "optional"; the
            "first" of the models; or an "ordinary" model.
        by_rows: the method that is taken in place of `method` where a flag sets ``whole`` to False
            for any tensor.
        required: the parameters that must be given, beside weights.
    """

    method: str
    shared: Mapping[str, str] = field(default_factory=dict)
    each: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    weight: bool = False
    flags: Mapping[str, Flag] = field(default_factory=dict)
    others: int | None = None
    fewest: int = 0
    base: Scope = "needed"
    by_rows: str = ""
    required: tuple[str, ...] = ()

    @property
    def for_all(self) -> set[str]:
        """The parameters that all models share."""
        return {*self.shared, *self.flags, *({"lambda"} if self.takes_lambda else ()), "int8_mask"}

    @property
    def for_one(self) -> set[str]:
        """The parameters that a model may have of its own."""
        return {*self.each, *({"weight"} if self.weight else ())}

    @property
    def takes_lambda(self) -> bool:
        """True for task arithmetic and its kin."""
        return "normalize" in self.flags and self.base == "needed"


_DIVISORS = ("none", "weights")
_INT8_MASK = {"int8_mask": Flag(False)}


def _sparse(method: str, *each: str, normalize: bool = False, rescale: bool = False) -> Translation:
    return Translation(
        method,
        each={name: name for name in each},
        flags=_INT8_MASK
        | {
            "normalize": Flag(normalize, "normalize", _DIVISORS),
            "rescale": Flag(rescale, "rescale", ("none", "l1")),
        },
        defaults={"density": 1.0, "gamma": 0.01, "epsilon": 0.15},
        weight=True,
    )


TRANSLATIONS = {
    "linear": Translation(
        "linear", weight=True, flags={"normalize": Flag(True, "normalize")}, base="ordinary"
    ),
    "slerp": Translation(
        "slerp", {"t": "t"}, fixed={"parallel": 0.9995}, others=1, base="first", required=("t",)
    ),
    "nuslerp": Translation(
        "nuslerp",
        weight=True,
        others=2,
        base="optional",
        flags={
            "nuslerp_flatten": Flag(True, "whole"),
            "nuslerp_row_wise": Flag(False, "along", ("last", "first")),
        },
        by_rows="nuslerp_rows",
    ),
    "karcher": Translation(
        "karcher",
        {"max_iter": "steps", "tol": "tolerance"},
        defaults={"max_iter": 10, "tol": 1e-5},
        base="ordinary",
    ),
    "passthrough": Translation(
        "passthrough", each={"scale": "scale"}, defaults={"scale": 1.0}, base="ordinary"
    ),
    "model_stock": Translation(
        "model_stock",
        fixed={"cosine_floor": 1e-6},
        fewest=2,
        flags={"filter_wise": Flag(False, "whole", (True, False))},
        by_rows="model_stock_rows",
    ),
    "task_arithmetic": Translation(
        "task_arithmetic",
        weight=True,
        flags=_INT8_MASK | {"normalize": Flag(False, "normalize", _DIVISORS)},
    ),
    "ties": _sparse("ties", "density", normalize=True),
    "dare_linear": _sparse("dare_linear", "density", rescale=True),
    "dare_ties": _sparse("dare_ties", "density", rescale=True),
    "breadcrumbs": _sparse("breadcrumbs", "density", "gamma"),
    "breadcrumbs_ties": _sparse("breadcrumbs_ties", "density", "gamma"),
    "della_linear": _sparse("della_linear", "density", "epsilon", rescale=True),
    "della": _sparse("della", "density", "epsilon", normalize=True, rescale=True),
    "sce": Translation(
        "sce", {"select_topk": "select_topk"}, fixed={"equal_below": 1e-6}, flags=_INT8_MASK
    ),
    "arcee_fusion": Translation("arcee_fusion", others=1, base="first"),
    "multislerp": Translation(
        "multislerp",
        {"eps": "epsilon"},
        weight=True,
        base="optional",
        flags={"normalize_weights": Flag(True, "normalize")},
    ),
    "nearswap": Translation("nearswap", {"t": "t"}, others=1, required=("t",)),
    "ram": Translation("ram", {"epsilon": "epsilon"}),
    "ramplus_tl": Translation("ramplus_tl", {"r": "r", "alpha": "limit", "epsilon": "epsilon"}),
}
