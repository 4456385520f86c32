"""Errors: each says what is wrong, where (file, key, shape) and what to do."""

from __future__ import annotations


class WeightopsError(Exception):
    """The root of every error that weightops raises on purpose."""


class CheckpointError(WeightopsError):
    """A file or object doesn't hold the weights it should."""


class MismatchError(WeightopsError):
    """Checkpoints that should match differ in names, shapes or dtypes."""


class SpaceError(WeightopsError):
    """Weights were given where a task vector is needed, or the reverse."""


class UnknownNameError(WeightopsError):
    """A name that no registry or list holds."""


class OptionError(WeightopsError, ValueError):
    """An option has a value that it can't have."""


class RecipeError(WeightopsError):
    """A recipe says something that isn't understood or can't be done."""


class OutputError(WeightopsError):
    """An output can't be written; nothing has been left behind."""


class NonfiniteError(WeightopsError):
    """A tensor holds NaN or Inf."""


class TaskError(WeightopsError):
    """The data of a task can't be had, or aren't what they should be."""


class MissingExtraError(WeightopsError):
    """An optional package is needed."""


def missing_extra(package: str, extra: str, purpose: str) -> MissingExtraError:
    """The error that names the ``pip install`` to run."""
    return MissingExtraError(f"{package} is needed {purpose}: pip install 'weightops[{extra}]'")
