"""Read docstrings in Google style: the text, and the descriptions of arguments."""

from __future__ import annotations

import re
from collections.abc import Callable
from inspect import cleandoc
from typing import Any, NamedTuple, TypeVar

F = TypeVar("F", bound=Callable[..., Any])

_SECTION = re.compile(r"^(Args|Attributes|Returns|Raises|Yields):\n", re.MULTILINE)
_ENTRY = re.compile(r"^    (\w+): ((?:.+)(?:\n(?: {8}.*)?)*)", re.MULTILINE)


class Docstring(NamedTuple):
    """The parts of a docstring.

    Attributes:
        summary: the first line.
        text: all that comes before the first section, the summary included.
        arguments: name -> description, of the sections Args and Attributes, each on one line.
    """

    summary: str
    text: str
    arguments: dict[str, str]


def parse(docstring: str | None) -> Docstring:
    """Split a docstring into its parts.

    >>> parse(parse.__doc__).summary
    'Split a docstring into its parts.'
    """
    clean = cleandoc(docstring or "")
    first, *sections = _SECTION.split(clean)
    arguments: dict[str, str] = {}
    for title, body in zip(sections[::2], sections[1::2], strict=True):
        if title in ("Args", "Attributes"):
            arguments |= {name: " ".join(text.split()) for name, text in _ENTRY.findall(body)}
    text = first.partition("\n>>> ")[0].strip()
    return Docstring(text.partition("\n")[0], text, arguments)


_FORMULA = re.compile(r"``[^`]+``|^    .+", re.MULTILINE)
_SYMBOLS = {
    "theta": "θ",
    "tau": "τ",
    "mu": "μ",
    "sum_": "Σ_",
    ">=": "≥",
    "<=": "≤",
    "||": "‖",
    "<-": "←",
    "~": "∼",
    "^-1": "⁻¹",
    "^2": "²",
}
_SUBSCRIPT = re.compile(r"(?<=[^\W_])_(\([ijkrt\d+-]+\)|[ijkrt\d]{1,2}(?!\w))")
_SUBSCRIPTS = str.maketrans("0123456789ijkrt()+-", "₀₁₂₃₄₅₆₇₈₉ᵢⱼₖᵣₜ₍₎₊₋")


def plain(text: str) -> str:
    """Return a text for a terminal: without the marks of code, formulas with their symbols.

    >>> plain("It gives ``theta_0 + alpha * sum_i tau_i``.")
    'It gives θ₀ + alpha * Σᵢ τᵢ.'
    """
    return _FORMULA.sub(lambda formula: _with_symbols(formula[0]), text).replace("`", "")


def _with_symbols(formula: str) -> str:
    """Return a formula with Greek letters, and with subscripts where there are characters."""
    for name, symbol in _SYMBOLS.items():
        pattern = rf"(?<![A-Za-z]){name}(?![A-Za-z])" if name.isalpha() else re.escape(name)
        formula = re.sub(pattern, symbol, formula)
    return _SUBSCRIPT.sub(lambda found: found[1].translate(_SUBSCRIPTS), formula)


def describe_arguments_as(source: type) -> Callable[[F], F]:
    """Complete a function's ``Args:`` by the descriptions of a class, for parameters of one name.

    Args:
        source: the class whose docstring describes arguments that several functions have.
    """

    def complete(function: F) -> F:
        clean = cleandoc(function.__doc__ or "")  # as Python 3.13 keeps it
        own, shared = parse(clean).arguments, parse(source.__doc__).arguments
        names = function.__code__.co_varnames
        missing = {name: shared[name] for name in names if name in shared and name not in own}
        lines = "".join(f"    {name}: {text}\n" for name, text in missing.items())
        before, heading, after = clean.partition("Args:\n")
        entries, gap, rest = after.partition("\n\n")
        function.__doc__ = f"{before}{heading}{entries}\n{lines.rstrip()}{gap}{rest}"
        return function

    return complete
