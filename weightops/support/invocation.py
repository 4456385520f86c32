"""The run that makes an output: its command line, date, versions and device, for model cards."""

from __future__ import annotations

import platform
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime, timezone

from weightops.support.calls import python_lines
from weightops.support.text import portable

_ARGUMENTS: ContextVar[Sequence[str]] = ContextVar("arguments of the command line", default=())


@contextmanager
def invoked_with(arguments: Sequence[str]) -> Iterator[None]:
    """Note the arguments of the command line that runs inside."""
    token = _ARGUMENTS.set(arguments)
    try:
        yield
    finally:
        _ARGUMENTS.reset(token)


def command_line() -> str:
    """Return the command that runs, with all its arguments; "" if Python runs without one.

    >>> with invoked_with(["merge", "/data/a", "b", "-o", "my merge"]):
    ...     print(command_line())
    weightops merge a b -o 'my merge'
    """
    arguments = _ARGUMENTS.get()
    parts = (",".join(map(portable, argument.split(","))) for argument in arguments)
    return shlex.join(["weightops", *parts]) if arguments else ""


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that results may depend on."""
    from importlib.metadata import version  # what starts without results does without it

    packages = ("weightops", "torch", "open_clip_torch", "torchvision", "pillow", "safetensors")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def today() -> str:
    """Return the day, in UTC."""
    return datetime.now(timezone.utc).date().isoformat()


def invocation() -> str:
    """Return the command that runs, or else the lines of Python; "" if neither is known."""
    return command_line() or python_lines()


def how_it_was_made(device: str, lines: str = "") -> str:
    """Return command, day, versions and device as Markdown.

    Args:
        device: where it was computed.
        lines: the lines of Python that make it, if no command and no known call does.
    """
    lines = invocation() or lines
    listed = ", ".join(f"{name} {number}" for name, number in versions().items())
    block = f"```{'sh' if command_line() else 'python'}\n{lines}\n```\n\n" if lines else ""
    return f"{block}Made on {today()}, on {device}, with {listed}."
