"""Read the options of a merge method from text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from weightops.merging.methods.method import Method


def read_method_options(method: Method, texts: Mapping[str, str]) -> dict[str, Any]:
    """Return a merge method's options, from what was typed.

    Raises:
        UsageError: for a value of another type.
        UnknownNameError: for an option that the method hasn't, or a choice that isn't one.
    """
    method.check({name: text for name, text in texts.items() if name not in method.options})
    values = {}
    for name, text in texts.items():
        kind = method.options[name].type
        try:
            values[name] = (
                {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
            )
        except (ValueError, KeyError):
            raise click.UsageError(
                f"{name} of {method.name} is {kind.__name__}, not {text!r}"
            ) from None
    checked = method.check(values)
    return {name: checked[name] for name in values}
