"""Say what was given where models are needed, for messages to people who mean something else."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeGuard, TypeVar

from weightops.algebra.linear_form import LinearForm
from weightops.errors import CheckpointError, OptionError
from weightops.support.lazy import nn, torch

T = TypeVar("T")

WEIGHTS = "a path, a ref, a Checkpoint, a state dict or a module"
"""The kinds of weights, in words."""


def kind_of(value: object) -> str:
    """Return the kind of an argument in words.

    >>> kind_of(None), kind_of({"w": torch.ones(2)}), kind_of(3)
    ('None', 'a state dict', 'an int')
    """
    if value is None:
        return "None"
    if isinstance(value, (str, Path)):
        return f"one path, {str(value)!r},"
    if isinstance(getattr(value, "form", None), LinearForm):
        return f"one {type(value).__name__}"
    if is_module(value):
        return f"one module, {type(value).__name__},"
    if isinstance(value, Mapping):
        return "a state dict"
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"


def is_module(value: object) -> TypeGuard[nn.Module]:
    """Return whether a value is a module, of which there is none before torch is imported."""
    return "torch" in sys.modules and isinstance(value, nn.Module)


def not_weights(value: object) -> CheckpointError:
    """Return the error for an argument that is no kind of weights."""
    hint = f"give {WEIGHTS}"
    if "torch" in sys.modules and isinstance(value, torch.Tensor):
        hint = 'a state dict names its tensors: {"weight": tensor}'
    elif isinstance(value, (list, tuple)):
        hint = f"give {WEIGHTS}; average([...]) and merge([...]) take several"
    return CheckpointError(f"{kind_of(value)} was given where weights are needed", hint=hint)


def several(models: Iterable[T], function: str) -> list[T]:
    """Return models as a list.

    Args:
        models: the models.
        function: the function that takes them, for the message.

    Raises:
        OptionError: if ``models`` is one model, and not several.
    """
    is_one = isinstance(models, (str, Path, Mapping)) or is_module(models)
    if is_one or not isinstance(models, Iterable):
        raise OptionError(
            f"{function} takes a list of models, and {kind_of(models)} was given",
            hint=f"{function}([a, b])",
        )
    return list(models)
