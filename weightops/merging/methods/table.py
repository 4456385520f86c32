"""The merge methods that have names: built-in ones, registered ones, and those of plug-ins."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar

from weightops.errors import OptionError
from weightops.merging.methods import (
    agreement,
    averaging,
    composed,
    from_data,
    fusion,
    interference,
    outliers,
    overlap,
    random_dropping,
    rows,
    spectral,
    spherical,
    trimming,
)
from weightops.merging.methods.method import Function, Method
from weightops.support.registry import Registry

MethodLike = str | Method | Function
"""The name of a merge method, a `Method`, or a function that is one."""

F = TypeVar("F", bound=Function | Method)

BUILT_IN: tuple[Method | Function, ...] = (
    averaging.linear,
    averaging.task_arithmetic,
    averaging.model_stock,
    rows.model_stock_rows,
    averaging.ema,
    averaging.passthrough,
    trimming.magnitude,
    trimming.ties,
    trimming.localize_and_stitch,
    random_dropping.dare_linear,
    random_dropping.dare_ties,
    outliers.breadcrumbs,
    outliers.breadcrumbs_ties,
    random_dropping.della_linear,
    random_dropping.della,
    agreement.sce,
    agreement.tall_consensus,
    spherical.slerp,
    spherical.nuslerp,
    rows.nuslerp_rows,
    spherical.multislerp,
    spherical.karcher,
    fusion.arcee_fusion,
    fusion.nearswap,
    overlap.ram,
    overlap.ramplus_tl,
    spectral.tsv_m,
    spectral.iso_c,
    spectral.iso_cts,
    interference.wudi,
    interference.doge,
    composed.knots,
    composed.subspace_boosting,
    from_data.fisher,
    from_data.regmean,
)


def _as_method(thing: object) -> Method:
    """Return a `Method`, or the one that a function is.

    Raises:
        OptionError: for anything else, or a function whose parameters no merge fills.
    """
    if isinstance(thing, Method):
        return thing
    if not callable(thing):
        raise OptionError(f"a merge method is a name or a function, not {thing!r}")
    return Method(getattr(thing, "__name__", type(thing).__name__), thing)


def _adapt(name: str, thing: Any) -> Method:
    """Return the method that an entry point names, under the entry point's name."""
    return replace(_as_method(thing), name=name)


METHODS: Registry[Method] = Registry(
    "merge method",
    "methods",
    {method.name: method for method in map(_as_method, BUILT_IN)},
    adapt=_adapt,
)
"""Name -> merge method. A package adds one by an entry point in the group ``weightops.methods``,
which names a function or a `Method`; a script by `method`."""


def as_method(method: MethodLike) -> Method:
    """Return the merge method of a name, or the one that a function is.

    Raises:
        UnknownNameError: if no method has this name.
        OptionError: if a parameter of the function is not one that a merge fills.
    """
    return METHODS[method] if isinstance(method, str) else _as_method(method)


def method(function: F) -> F:
    """Register a function as a merge method for this session, under the function's name.

    Args:
        function: takes the models' tensors of one name, stacked with shape ``(k, ...)``, as
            ``deltas`` (differences from the base) to return a merged delta, or as ``models`` to
            return merged weights. It may also take ``weights``, shape ``(k,)``. Its keyword-only
            parameters are the method's options, with annotations and defaults. Or a `Method`, such
            as `chunks` builds from a function of a part of the tensors.

    Returns:
        The function.

    Raises:
        OptionError: if the name is taken, or a parameter is not one that a merge fills.

    >>> import torch
    >>> import weightops
    >>> @weightops.method
    ... def largest_change(deltas: torch.Tensor, *, strength: float = 1.0) -> torch.Tensor:
    ...     '''Keep the largest of the models' changes, element by element.
    ...
    ...     Args:
    ...         deltas: shape ``(k, ...)``.
    ...         strength: the factor of the result.
    ...     '''
    ...     return strength * deltas.gather(0, deltas.abs().argmax(0, keepdim=True))[0]
    >>> base, a, b = ({"w": torch.tensor(x)} for x in ([0.0, 0.0], [3.0, 1.0], [2.0, -4.0]))
    >>> weightops.merge([a, b], "largest_change", base=base, strength=0.5)["w"]
    tensor([ 1.5000, -2.0000])
    """
    registered = _as_method(function)
    METHODS.register(registered.name, registered)
    return function
