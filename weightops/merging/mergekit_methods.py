"""The merge methods of mergekit in terms of weightops: their parameters, and what these become."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

Scope = Literal["needed", "first", "ordinary", "optional"]


class Variant(NamedTuple):
    """Another method, which a flag chooses where it differs from its default."""

    default: bool
    method: str
    options: Mapping[str, Any]


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
        normalize: mergekit's default of ``normalize``, or None if the method hasn't the parameter.
        divisor: the values of the method's option ``normalize`` for False and True.
        rescale: mergekit's default of ``rescale``, or None if the method hasn't the parameter.
        others: the number of models beside the base, where it is fixed.
        fewest: the least number of models beside the base.
        base: the part of base_model: the base of the task vectors, "needed" or "optional"; the
            "first" of the models; or an "ordinary" model.
        variants: flag -> the method that it chooses, with its options, where it isn't the default.
        required: the parameters that must be given, beside weights.
    """

    method: str
    shared: Mapping[str, str] = field(default_factory=dict)
    each: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    weight: bool = False
    normalize: bool | None = None
    divisor: tuple[Any, Any] = ("none", "weights")
    rescale: bool | None = None
    others: int | None = None
    fewest: int = 0
    base: Scope = "needed"
    variants: Mapping[str, Variant] = field(default_factory=dict)
    required: tuple[str, ...] = ()

    @property
    def for_all(self) -> set[str]:
        """The parameters that all models share."""
        flags = {"normalize"} if self.normalize is not None else set()
        flags |= {"rescale"} if self.rescale is not None else set()
        flags |= {"lambda"} if self.takes_lambda else set()
        return {*self.shared, *flags, *self.variants, "int8_mask"}

    @property
    def for_one(self) -> set[str]:
        """The parameters that a model may have of its own."""
        return {*self.each, *({"weight"} if self.weight else ())}

    @property
    def takes_lambda(self) -> bool:
        """True for task arithmetic and its kin."""
        return self.normalize is not None and self.base == "needed"


def _sparse(method: str, *each: str, normalize: bool = False, rescale: bool = False) -> Translation:
    return Translation(
        method,
        each={name: name for name in each},
        defaults={"density": 1.0, "gamma": 0.01, "epsilon": 0.15},
        weight=True,
        normalize=normalize,
        rescale=rescale,
    )


TRANSLATIONS = {
    "linear": Translation(
        "linear", weight=True, normalize=True, divisor=(False, True), base="ordinary"
    ),
    "slerp": Translation(
        "slerp", {"t": "t"}, fixed={"parallel": 0.9995}, others=1, base="first", required=("t",)
    ),
    "nuslerp": Translation(
        "nuslerp",
        weight=True,
        others=2,
        base="optional",
        variants={
            "nuslerp_flatten": Variant(True, "nuslerp_rows", {"along": "last"}),
            "nuslerp_row_wise": Variant(False, "nuslerp_rows", {"along": "first"}),
        },
    ),
    "karcher": Translation(
        "karcher",
        {"max_iter": "steps", "tol": "tolerance"},
        defaults={"max_iter": 10, "tol": 1e-5},
        base="ordinary",
    ),
    "passthrough": Translation("passthrough", each={"scale": "scale"}, base="ordinary"),
    "model_stock": Translation(
        "model_stock",
        fixed={"cosine_floor": 1e-6},
        fewest=2,
        variants={"filter_wise": Variant(False, "model_stock_rows", {})},
    ),
    "task_arithmetic": Translation("task_arithmetic", weight=True, normalize=False),
    "ties": _sparse("ties", "density", normalize=True),
    "dare_linear": _sparse("dare_linear", "density", rescale=True),
    "dare_ties": _sparse("dare_ties", "density", rescale=True),
    "breadcrumbs": _sparse("breadcrumbs", "density", "gamma"),
    "breadcrumbs_ties": _sparse("breadcrumbs_ties", "density", "gamma"),
    "della_linear": _sparse("della_linear", "density", "epsilon", rescale=True),
    "della": _sparse("della", "density", "epsilon", normalize=True, rescale=True),
    "sce": Translation("sce", {"select_topk": "select_topk"}, fixed={"equal_below": 1e-6}),
    "arcee_fusion": Translation("arcee_fusion", others=1, base="first"),
    "multislerp": Translation(
        "multislerp",
        {"normalize_weights": "normalize", "eps": "epsilon"},
        weight=True,
        base="optional",
    ),
    "nearswap": Translation("nearswap", {"t": "t"}, others=1, required=("t",)),
    "ram": Translation("ram", {"epsilon": "epsilon"}),
    "ramplus_tl": Translation("ramplus_tl", {"r": "r", "alpha": "limit", "epsilon": "epsilon"}),
}
