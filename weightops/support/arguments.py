"""Check the arguments of a function by its annotations; call one with what it takes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from numbers import Integral, Real
from types import NoneType, SimpleNamespace
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from weightops.errors import OptionError
from weightops.support.ranges import Range
from weightops.support.registry import unknown


def check_arguments(declared: Callable[..., Any], **arguments: Any) -> None:
    """Check that arguments are among the choices, and in the ranges, that are declared for them.

    Args:
        declared: a function with parameters, or a dataclass with fields, such as
            ``rule: Literal["patching", "mean"]`` or ``drop: Annotated[float, Range(0, 1)]``.
        arguments: some of its arguments, by name.

    Raises:
        UnknownNameError: for a value that isn't one of the choices.
        OptionError: for what isn't a number, or one that is outside of its range.
    """
    hints = hints_of(declared, arguments)
    for name, value in arguments.items():
        hint = hints[name]
        if NoneType in get_args(hint):
            if value is None:
                continue
            hint = next(one for one in get_args(hint) if one is not NoneType)
        first, *others = get_args(hint) or (None,)
        if get_origin(hint) is Literal and value not in get_args(hint):
            raise unknown(name.replace("_", " "), value, get_args(hint))
        for allowed in others if get_origin(hint) is Annotated else ():
            if isinstance(allowed, Range):
                _check(name, value, first is int, allowed)


def hints_of(declared: Callable[..., Any], names: Iterable[str]) -> dict[str, Any]:
    """Return the types of some parameters; other annotations, such as of tensors, aren't looked up.

    >>> def power(base: torch.Tensor, exponent: float) -> torch.Tensor: ...
    >>> hints_of(power, ["exponent"])
    {'exponent': <class 'float'>}
    """
    if isinstance(declared, type):
        return get_type_hints(declared, include_extras=True)
    function = inspect.unwrap(declared)
    wanted = {name: inspect.get_annotations(function)[name] for name in names}
    chosen = SimpleNamespace(__annotations__=wanted)
    return get_type_hints(chosen, function.__globals__, include_extras=True)


def _check(name: str, value: Any, integer: bool, allowed: Range) -> None:
    is_number = isinstance(value, Integral if integer else Real) and not isinstance(value, bool)
    if not is_number or value not in allowed:
        kind = "an integer" if integer else "a number"
        raise OptionError(f"{name} is {value!r}, and must be {kind} {allowed}")


def call(function: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    """Call a function with those of the arguments that it has parameters for.

    >>> call(lambda a, b: a - b, {"a": 3, "b": 1, "c": 7})
    2
    """
    return function(**{name: arguments[name] for name in _parameters_of(function)})


@cache
def _parameters_of(function: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)
