"""Merge methods: functions whose signatures are their schema."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from numbers import Real
from typing import Any, Literal, get_args, get_origin

from weightops.algebra.names import Each, PerTensor
from weightops.algebra.source import Factors, Space
from weightops.errors import OptionError, UnknownNameError
from weightops.statistics.statistic import Kind as StatisticKind
from weightops.support.arguments import hints_of
from weightops.support.registry import unknown

Function = Callable[..., Any]
"""A function that returns a tensor, or numbers; see `Computation`."""
Statistic = Callable[..., Any]
Kind = Literal["whole", "chunks", "combination"]

STATISTICS: Mapping[str, StatisticKind] = {"grams": "gram", "fishers": "fisher"}
"""Parameter of a method's function -> the kind of statistic that it is of each model."""


@dataclass(frozen=True)
class Computation:
    """A description of what a method's function computes.

    Attributes:
        kind: what the function returns: "whole" tensors, "chunks" of them, or the coefficients
            of a linear "combination" of the inputs.
        space: for a combination, whether the inputs are weights or deltas.
        statistics: parameter of the function -> the function that computes its value, of chunks
            or whole tensors.
        by_rows: for chunks, never cut rows.
        on_deltas: for chunks of weights, deltas do as well.
        of_factors: for whole tensors, a function that returns the `Factors` of the result from
            those of the deltas, a list of k, so that no matrix of low rank need be whole.
        of_numbers: for a combination, weights and coefficients are lists of numbers.
    """

    kind: Kind = "whole"
    space: Space | None = None
    statistics: Mapping[str, Statistic] = field(default_factory=dict, hash=False)
    by_rows: bool = False
    on_deltas: bool = False
    of_factors: Callable[..., Factors] | None = None
    of_numbers: bool = False

    @property
    def arguments(self) -> set[str]:
        """The names that the function's positional parameters may have."""
        if self.kind == "combination":
            return {"gram", "weights"}
        inputs = {"deltas", "models", "weights"}
        if self.kind == "whole":
            return {*inputs, *self.statistics, *STATISTICS, "fisher_norms"}
        return {*inputs, *self.statistics, "start", "draws"}


def combination(space: Space) -> Callable[[Function], Method]:
    """Build a `Method` from a function that returns the coefficients of a linear combination.

    The function takes some of ``gram`` (the inner products of the inputs at one tensor, float64,
    shape ``(k, k)``) and ``weights`` (float64, shape ``(k,)``), and returns shape ``(k,)``.

    Args:
        space: "weights" or "delta": what the inputs are.
    """
    return lambda function: Method(function.__name__, function, Computation("combination", space))


def fixed_combination(space: Space) -> Callable[[Callable[..., list[float]]], Method]:
    """Build a `Method` from a function of ``weights`` alone, a list of k numbers.

    It returns the coefficients of a linear combination, a list of k numbers.

    Args:
        space: "weights" or "delta": what the inputs are.
    """
    computation = Computation("combination", space, of_numbers=True)
    return lambda function: Method(function.__name__, function, computation)


def with_factors(of_factors: Callable[..., Factors]) -> Callable[[Function], Method]:
    """Build a `Method` from a function of whole deltas, and one of their factors.

    Args:
        of_factors: takes ``factors``, and what it needs of the weights and the options; returns the
            `Factors` of the merged delta.
    """
    computation = Computation(of_factors=of_factors)
    return lambda function: Method(function.__name__, function, computation)


def chunks(
    *, by_rows: bool = False, on_deltas: bool = False, **statistics: Statistic
) -> Callable[[Function], Method]:
    """Build a `Method` from a function that computes each element from the inputs at that element.

    The function takes a part of the flat tensor, ``deltas`` or ``models`` of shape ``(k, n)``,
    which it may overwrite, and returns shape ``(n,)``. It may also take ``weights`` (shape
    ``(k,)``), ``start`` (the position of the part), ``draws`` (see `Draws`) and statistics of the
    whole tensor.

    Args:
        by_rows: give the function whole rows, shape ``(k, rows, width)``, for ``(rows, width)``.
        on_deltas: give the function deltas as ``models`` where a merge has a base.
        statistics: parameter of the function -> the function that computes its value. A statistic
            takes some of ``inputs`` (`TensorInputs`), ``model_inputs`` (`ModelInputs`), the
            weights, the options and the statistics before it.
    """
    computation = Computation("chunks", statistics=statistics, by_rows=by_rows, on_deltas=on_deltas)
    return lambda function: Method(function.__name__, function, computation)


def whole(**statistics: Statistic) -> Callable[[Function], Method]:
    """Build a `Method` from a function of whole tensors that takes statistics as `chunks` does."""
    computation = Computation(statistics=statistics)
    return lambda function: Method(function.__name__, function, computation)


@dataclass(frozen=True)
class Option:
    """One option of a method.

    Attributes:
        type: the type of a value.
        default: the value if none is given.
        choices: the possible values, where they are listed.
        each: whether each input may have its own value: the annotation says so, ``float | Each``.
    """

    type: type
    default: Any
    choices: tuple[Any, ...] = ()
    each: bool = False

    def parse(self, value: Any, name: str) -> Any:
        """Return a value in the option's type.

        Args:
            value: one value, not a `PerTensor`.
            name: what messages call the option.

        Raises:
            UnknownNameError: if the value isn't one of the choices.
            OptionError: if the value has another type.
        """
        if self.choices:
            if value not in self.choices:
                choices = " or ".join(map(repr, self.choices))
                raise UnknownNameError(f"{name} is {choices}, not {value!r}")
            return value
        if self.type is bool:
            valid, wanted = isinstance(value, bool), "true or false"
        elif self.type in (int, float):
            number = isinstance(value, Real) and not isinstance(value, bool)
            whole = self.type is float or (number and value == int(value))
            valid = number and math.isfinite(value) and whole
            wanted = "a whole number" if self.type is int else "a finite number"
        else:
            return value
        if not valid:
            raise OptionError(f"{name} is {wanted}, not {value!r}")
        return self.type(value)


@dataclass(frozen=True)
class Method:
    """A merge method: a name, and a function whose signature says what the method takes.

    The function takes the inputs' tensors of one name, stacked in float32 (float64 for float64)
    with shape ``(k, ...)``: as ``deltas``, differences from the base, to return a merged delta; or
    as ``models``, weights, to return merged weights. It may also take ``weights`` (shape ``(k,)``).
    All its keyword-only parameters are options. A function of `chunks` or `combination` need never
    hold a whole tensor.

    A function of whole tensors may ask for statistics of the models: ``fishers``, of the tensors'
    shape, with ``fisher_norms``, the norms over all tensors, shape ``(k,)``; or ``grams``, shape
    ``(k, d, d)``, in which case the tensors of a linear map come as matrices ``(k, out, d)``, one
    after another if the weight holds several. A statistic is None at tensors that it doesn't have.

    Raises:
        OptionError: if a parameter is neither of these, or an option has no default.
    """

    name: str
    function: Function
    computation: Computation = Computation()

    def __post_init__(self) -> None:
        for name, parameter in self._parameters.items():
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
                if parameter.default is inspect.Parameter.empty:
                    raise OptionError(f"the option {name} of {self.name} has no default")
            elif name not in self.computation.arguments:
                raise OptionError(
                    f"{self.name} has a parameter {name!r}, which no merge fills",
                    hint=f"known: {', '.join(sorted(self.computation.arguments))}; options are "
                    f"keyword-only, as in {self.name}(deltas, *, {name}=...)",
                )

    def __repr__(self) -> str:
        options = "".join(f", {name}={o.default!r}" for name, o in self.options.items())
        kind = "task vectors" if self.space == "delta" else "weights"
        return f"Method({self.name!r} on {kind}{options})"

    @cached_property
    def _parameters(self) -> Mapping[str, inspect.Parameter]:
        return inspect.signature(self.function).parameters

    @property
    def kind(self) -> Kind:
        """Whether the function returns a whole tensor, chunks of it, or coefficients."""
        return self.computation.kind

    @property
    def space(self) -> Space:
        """Whether the method works on weights or on deltas, differences from a base."""
        return self.computation.space or ("delta" if "deltas" in self._parameters else "weights")

    def works_on(self, space: Space) -> bool:
        """Return True if the method takes inputs of a space; combinations always take deltas."""
        takes_deltas = self.kind == "combination" or self.computation.on_deltas
        return space == self.space or (takes_deltas and space == "delta")

    @property
    def fixed(self) -> bool:
        """True for combinations whose coefficients don't depend on the tensors."""
        return self.kind == "combination" and "gram" not in self._parameters

    def takes(self, argument: str) -> bool:
        """Return True if the function, or one of its statistics, has a parameter of this name."""
        functions = [self.function, *self.computation.statistics.values()]
        return any(argument in inspect.signature(each).parameters for each in functions)

    @property
    def statistics(self) -> list[StatisticKind]:
        """The kinds of statistics that the method takes of each model."""
        return [kind for parameter, kind in STATISTICS.items() if self.takes(parameter)]

    @cached_property
    def options(self) -> dict[str, Option]:
        """Name -> type, default and choices."""
        own = {n: p for n, p in self._parameters.items() if p.kind is p.KEYWORD_ONLY}
        hints = hints_of(self.function, [n for n, p in own.items() if p.annotation is not p.empty])
        options = {}
        for name, parameter in own.items():
            default = parameter.default
            hint = hints.get(name, type(default))
            each = Each in get_args(hint)
            if each:
                [hint] = (kind for kind in get_args(hint) if kind is not Each)
            literal = get_origin(hint) is Literal
            choices = get_args(hint) if literal else ()
            options[name] = Option(type(default) if literal else hint, default, choices, each)
        return options

    @property
    def summary(self) -> str:
        """The first line of the function's docstring."""
        return (inspect.getdoc(self.function) or "").partition("\n")[0]

    def check(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Return all options, with defaults where none is given.

        Raises:
            UnknownNameError: for an option that the method doesn't have, or a value that isn't one
                of the choices, with the nearest.
            OptionError: for a value of another type.
        """
        for name in options:
            if name not in self.options:
                raise unknown(f"option of {self.name}", name, self.options)
        checked = {name: self._checked(name, value) for name, value in options.items()}
        return {name: checked.get(name, option.default) for name, option in self.options.items()}

    def _checked(self, name: str, value: PerTensor) -> PerTensor:
        """Return an option's `PerTensor` with each value in the option's type."""
        option = self.options[name]
        if isinstance(value, Mapping):
            return {pattern: self._checked(name, inner) for pattern, inner in value.items()}
        if isinstance(value, Each):
            if not option.each:
                able = [other for other, option in self.options.items() if option.each]
                raise OptionError(
                    f"{name} of {self.name} has one value for all models, not {list(value)}",
                    hint=f"{' and '.join(able)} may have one for each" if able else "",
                )
            return Each(self._checked(name, inner) for inner in value)
        if isinstance(value, (list, tuple)) and (option.type in (float, bool) or option.choices):
            return [self._checked(name, inner) for inner in value]
        return option.parse(value, f"{name} of {self.name}")
