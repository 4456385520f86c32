"""What a merge method is: a function whose signature is its schema, and the lazy source that runs it."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from numbers import Real
from typing import Any, Literal, TypeVar, get_args, get_type_hints

import torch

from weightops.algebra.names import Each, PerTensor
from weightops.algebra.source import Space
from weightops.errors import OptionError, UnknownNameError
from weightops.support.registry import unknown

F = TypeVar("F", bound=Callable[..., Any])

Kind = Literal["whole", "chunks", "combination"]


def combination(space: Space) -> Callable[[F], F]:
    """Mark a function that gives the coefficients of a linear combination of the inputs, which are weights or deltas.

    It takes some of ``gram`` (the inputs' inner products at the tensor, float64, shape ``(k, k)``) and ``weights``
    (shape ``(k,)``), and gives shape ``(k,)``.
    """
    return _marked("combination", space=space)


def chunks(*statistics: Callable[..., Any], by_rows: bool = False) -> Callable[[F], F]:
    """Mark a function that computes each element from the inputs at that element, and from statistics.

    It takes and gives parts of the flat tensor, ``(k, n)`` to ``(n,)``, or with ``by_rows`` whole rows, ``(k, rows, width)`` to
    ``(rows, width)``, may overwrite what it takes, and may ask for ``start``, the part's place.

    Args:
        statistics: functions of `TensorInputs`, and of any of the options, weights and statistics before them, whose results the function gets
            under their names.
        by_rows: don't cut rows.
    """
    return _marked("chunks", statistics=statistics, by_rows=by_rows)


def _marked(kind: Kind, **marks: Any) -> Callable[[F], F]:
    def mark(function: F) -> F:
        function.__dict__.update(marks, kind=kind)
        return function

    return mark


@dataclass(frozen=True)
class Option:
    """One option of a method: its type, its default, and its choices where it has them."""

    type: type
    default: Any
    choices: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Method:
    """A merge method, read off its function.

    The function takes the inputs' tensors of one name, stacked in float32 (float64 for float64) with shape ``(k, ...)``:
    as ``deltas``, differences from the base, and then gives a delta; or as ``models``, weights, and then gives weights.
    It may also take ``weights`` (a tensor of shape ``(k,)``) and, in `chunks`, ``draws`` (see `Draws`). All its
    keyword-only parameters are options. Functions marked by `chunks` or `combination` need never hold a whole tensor.
    """

    name: str
    function: Callable[..., torch.Tensor]

    @cached_property
    def _parameters(self) -> Mapping[str, inspect.Parameter]:
        return inspect.signature(self.function).parameters

    @property
    def kind(self) -> Kind:
        """What the function gives: a whole tensor, parts of it, or the coefficients of a combination."""
        kind: Kind = getattr(self.function, "kind", "whole")
        return kind

    @property
    def space(self) -> Space:
        """Whether it works on weights or on deltas: differences from a base."""
        space: Space | None = getattr(self.function, "space", None)
        return space or ("delta" if next(iter(self._parameters)) == "deltas" else "weights")

    def works_on(self, space: Space) -> bool:
        """Combinations of weights are combinations of deltas too."""
        return space == self.space or (self.kind == "combination" and space == "delta")

    @property
    def fixed(self) -> bool:
        """True for combinations whose coefficients don't depend on the tensors."""
        return self.kind == "combination" and "gram" not in self._parameters

    def takes(self, argument: str) -> bool:
        """True if the function, or a statistic that it asks for, has a parameter of this name."""
        asked = [self.function, *self.function.__dict__.get("statistics", ())]
        return any(argument in inspect.signature(function).parameters for function in asked)

    @cached_property
    def options(self) -> dict[str, Option]:
        """Name -> type, default and choices."""
        hints = get_type_hints(self.function)
        options = {}
        for name, parameter in self._parameters.items():
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
                choices = get_args(hints[name])
                options[name] = Option(
                    type(parameter.default) if choices else hints[name], parameter.default, choices
                )
        return options

    @property
    def summary(self) -> str:
        """The first line of its docstring."""
        return (inspect.getdoc(self.function) or "").partition("\n")[0]

    def check(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The options with defaults filled in.

        Raises:
            UnknownNameError: for an option that it hasn't, or a choice that isn't one, with the nearest.
            OptionError: for a value of another type.
        """
        for name in options:
            if name not in self.options:
                raise unknown(f"option of {self.name}", name, self.options)
        checked = {name: self._checked(name, value) for name, value in options.items()}
        return {name: checked.get(name, option.default) for name, option in self.options.items()}

    def _checked(self, name: str, value: PerTensor) -> PerTensor:
        """An option's value, or each within a setting, as a number of its type."""
        option = self.options[name]
        if isinstance(value, Mapping):
            return {pattern: self._checked(name, inner) for pattern, inner in value.items()}
        if isinstance(value, Each):
            return Each(self._checked(name, inner) for inner in value)
        if isinstance(value, (list, tuple)) and option.type is float:
            return [self._checked(name, inner) for inner in value]
        if option.choices:
            if value not in option.choices:
                raise UnknownNameError(
                    f"{name} of {self.name} is {' or '.join(map(repr, option.choices))}, not {value!r}"
                )
            return value
        if option.type not in (bool, int, float):
            return value
        if option.type is bool:
            sound = isinstance(value, bool)
        else:
            number = isinstance(value, Real) and not isinstance(value, bool)
            sound = (
                number and math.isfinite(value) and (option.type is float or value == int(value))
            )
        if not sound:
            kind = {bool: "true or false", int: "a whole number", float: "a finite number"}[
                option.type
            ]
            raise OptionError(f"{name} of {self.name} is {kind}, not {value!r}")
        return option.type(value)
