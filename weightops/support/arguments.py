"""Check arguments against the annotations of the function that takes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from weightops.errors import OptionError
from weightops.support.ranges import Range
from weightops.support.registry import unknown


def check_arguments(function: Callable[..., Any], **arguments: Any) -> None:
    """Check that arguments are among the choices, and in the ranges, that a function declares.

    Args:
        function: a function with parameters such as ``rule: Literal["patching", "mean"]`` or
            ``drop: Annotated[float, Range(0, 1)]``.
        arguments: some of its arguments, by name.

    Raises:
        UnknownNameError: for a value that isn't one of the choices.
        OptionError: for a number that is outside of its range.
    """
    hints = get_type_hints(function, include_extras=True)
    for name, value in arguments.items():
        hint = hints[name]
        if get_origin(hint) is Literal and value not in get_args(hint):
            raise unknown(name.replace("_", " "), value, get_args(hint))
        for item in get_args(hint)[1:] if get_origin(hint) is Annotated else ():
            if isinstance(item, Range) and value not in item:
                raise OptionError(f"{name} is {value!r}, and must be {item}")
