"""The call of Python that makes an output, as the lines that repeat it, for model cards."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import fields, is_dataclass
from functools import wraps
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec, TypeVar

from weightops.errors import printable
from weightops.support.text import portable

P = ParamSpec("P")
R = TypeVar("R")

_WIDTH, _LONGEST_REMARK = 88, 120


class _Call(NamedTuple):
    """A call: the name of the function in weightops, its signature, and the arguments."""

    name: str
    signature: inspect.Signature
    positional: tuple[Any, ...]
    named: Mapping[str, Any]


_CALL: ContextVar[_Call | None] = ContextVar("the call that makes an output", default=None)


def repeatable(name: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Return a decorator that notes the calls of a function, the outermost of several.

    Args:
        name: the function's name in weightops, such as ``lofi.run``.

    >>> @repeatable("shift")
    ... def shift(model, *, alpha=1.0, out="shifted"):
    ...     print(python_lines())
    >>> shift("pre", alpha=0.5)
    from weightops import shift
    <BLANKLINE>
    shift("pre", alpha=0.5)
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @wraps(function)
        def call(*positional: P.args, **named: P.kwargs) -> R:
            if _CALL.get() is not None:
                return function(*positional, **named)
            signature = inspect.signature(function)
            token = _CALL.set(_Call(name, signature, positional, named))
            try:
                return function(*positional, **named)
            finally:
                _CALL.reset(token)

        return call

    return decorate


def python_lines() -> str:
    """Return the lines of Python that repeat the call that runs; "" if none is noted.

    What lives in memory only has the name of its parameter, and a comment says what it is.
    """
    call = _CALL.get()
    if call is None:
        return ""
    imports, remarks = {call.name.partition(".")[0]}, []
    parameters = list(call.signature.parameters.values())
    given = [*zip(parameters, call.positional, strict=False)]
    given += [(call.signature.parameters[name], value) for name, value in call.named.items()]
    arguments = []
    for i, (parameter, value) in enumerate(given):
        if value is parameter.default:
            continue
        text = _text(value, imports)
        if text is None:
            shown = printable(str(portable(repr(value))))
            remarks.append(f"# {parameter.name} = {shown[:_LONGEST_REMARK]}")
            text = parameter.name
        arguments.append(text if i < len(call.positional) else f"{parameter.name}={text}")
    line = f"{call.name}({', '.join(arguments)})"
    if len(line) > _WIDTH:
        line = f"{call.name}(\n" + "".join(f"    {text},\n" for text in arguments) + ")"
    return "\n".join([f"from weightops import {', '.join(sorted(imports))}", "", *remarks, line])


def _text(value: Any, imports: set[str]) -> str | None:
    """Return a value as Python has it, noting what it takes to import; None if it can't."""
    if isinstance(value, (str, Path)):
        return printable(json.dumps(portable(str(value)), ensure_ascii=False))
    if value is None or isinstance(value, (bool, int, float)):
        return repr(value)
    if isinstance(value, (list, tuple)):
        texts = [_text(item, imports) for item in value]
        if None in texts:
            return None
        inside = ", ".join(map(str, texts))
        if isinstance(value, list):
            return f"[{inside}]"
        return f"({inside}{',' if len(texts) == 1 else ''})"
    if isinstance(value, dict):
        pairs = [(_text(key, imports), _text(item, imports)) for key, item in value.items()]
        if any(None in pair for pair in pairs):
            return None
        return "{" + ", ".join(f"{key}: {item}" for key, item in pairs) + "}"
    return _settings(value, imports)


def _settings(value: Any, imports: set[str]) -> str | None:
    """Return settings of weightops, such as `TrainingConfig`, without those of the default."""
    kind = type(value)
    if not is_dataclass(kind) or not kind.__module__.startswith("weightops."):
        return None
    if any(not one.init or one.name.startswith("_") for one in fields(kind)):
        return None
    own: set[str] = {kind.__name__}
    changed = [
        (one.name, _text(getattr(value, one.name), own))
        for one in fields(kind)
        if getattr(value, one.name) != one.default
    ]
    if any(text is None for _, text in changed):
        return None
    imports |= own
    return f"{kind.__name__}({', '.join(f'{name}={text}' for name, text in changed)})"
