"""The errors that weightops raises on purpose.

Each says the fact (which file, key or shape) and, where there is one, the remedy as a hint::

    WeightopsError
    ├── CheckpointError        a file or object doesn't hold the weights that it should
    ├── MismatchError          checkpoints differ in names, shapes or dtypes
    ├── SpaceError             weights were given where a task vector is needed, or the reverse
    ├── NonfiniteError         a tensor holds NaN or infinities
    ├── OptionError            an argument has a value that it can't have (a ValueError, too)
    │   └── UnknownNameError   no registry or list holds this name
    ├── RecipeError            a recipe says something that isn't understood or can't be done
    ├── MethodError            a merge method gave something that isn't a merged tensor
    ├── TaskError              the data of a task are missing, or aren't what they should be
    ├── NothingSatisfiesError  no coefficient satisfies the constraint
    ├── OutputError            an output can't be written; nothing has been left behind
    ├── UnverifiedError        an output can't be checked, as an input or its record is missing
    └── MissingExtraError      an optional package is needed
"""

from __future__ import annotations

import re

_UNPRINTABLE = re.compile(
    r"(?!\n  )[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]"
)
"""Control characters, marks of direction and line breaks; a list in an error is indented."""

_LONGEST = 10_000
"""The most characters of a message."""


def _escaped(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode()


def _cut(text: str) -> str:
    """Return a text, or its beginning and end if it is longer than any message of ours."""
    left_out = len(text) - _LONGEST
    if left_out <= 0:
        return text
    return f"{text[: _LONGEST // 2]} ({left_out:,} characters more) {text[-_LONGEST // 2 :]}"


def printable(text: str) -> str:
    r"""Return a text from somewhere else on one line, its control characters escaped.

    >>> print(printable("a\nb"))
    a\nb
    """
    return _UNPRINTABLE.sub(_escaped, text.replace("\n", "\\n"))


class WeightopsError(Exception):
    """The root of all errors that weightops raises on purpose.

    Args:
        fact: what is wrong, and where.
        hint: what to do about it. Arguments are named as in Python, such as ``base=``; the command
            line translates them into its options.

    >>> print(WeightopsError("out exists", hint="overwrite=True replaces it"))
    out exists
    hint: overwrite=True replaces it
    """

    def __init__(self, fact: str, *, hint: str = "") -> None:
        # A name from a file must not end the line, fill the terminal, or change what it shows.
        fact, hint = (_UNPRINTABLE.sub(_escaped, _cut(text)) for text in (fact, hint))
        super().__init__(f"{fact}\nhint: {hint}" if hint else fact)
        self.fact, self.hint = fact, hint

    def prefixed(self, place: str) -> WeightopsError:
        """Return the same error with the place before its fact, such as a file's name."""
        return type(self)(f"{place}: {self.fact}", hint=self.hint)


class CheckpointError(WeightopsError):
    """A file or object doesn't hold the weights that it should."""


class MismatchError(WeightopsError):
    """Checkpoints that should match differ in names, shapes or dtypes."""


class SpaceError(WeightopsError):
    """Weights were given where a task vector is needed, or the reverse."""


class NonfiniteError(WeightopsError):
    """A tensor holds NaN or infinities."""


class OptionError(WeightopsError, ValueError):
    """An argument has a value that it can't have."""


class UnknownNameError(OptionError):
    """No registry or list holds this name."""


class RecipeError(WeightopsError):
    """A recipe says something that isn't understood or can't be done."""


class MethodError(WeightopsError):
    """A merge method gave something that isn't a merged tensor."""


class TaskError(WeightopsError):
    """The data of a task are missing, or aren't what they should be."""


class NothingSatisfiesError(WeightopsError):
    """No coefficient satisfies the constraint; the message says which comes nearest."""


class OutputError(WeightopsError):
    """An output can't be written; nothing has been left behind."""


class UnverifiedError(WeightopsError):
    """An output can't be checked: an input is gone or another, or nothing says how it was made."""


class MissingExtraError(WeightopsError):
    """An optional package is needed."""


def missing_extra(package: str, extra: str, purpose: str) -> MissingExtraError:
    """Return the error that names the ``pip install`` to run."""
    return MissingExtraError(
        f"{package} is needed {purpose}", hint=f"pip install 'weightops[{extra}]'"
    )
