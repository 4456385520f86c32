"""Modules that are imported when something of them is first used, as torch takes a second.

What answers from headers and signatures, such as ``weightops inspect``, ``--dry-run`` and refusals,
never uses it. All of weightops takes ``torch`` from here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from importlib import import_module
from inspect import isgeneratorfunction
from types import ModuleType
from typing import TYPE_CHECKING, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class LazyModule(ModuleType):
    """A module that stands for another one, and imports it at the first use.

    >>> math = LazyModule("math")
    >>> math.sqrt(4.0)
    2.0
    """

    def __getattr__(self, name: str) -> object:
        value = getattr(import_module(self.__name__), name)
        setattr(self, name, value)  # from now on it is found without this function
        return value


def without_gradients(function: Callable[P, T]) -> Callable[P, T]:
    """Run a function under ``torch.no_grad()``, which as a decorator would import torch.

    A generator is refused: its body runs after the function has returned.
    """
    assert not isgeneratorfunction(function), function

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        with torch.no_grad():
            return function(*args, **kwargs)

    return run


if TYPE_CHECKING:
    import numpy as np
    import torch as torch
    import torch.distributed as dist
    import torch.nn.functional as F
    from torch import nn as nn

    __all__ = ["F", "LazyModule", "dist", "nn", "np", "torch", "without_gradients"]
else:
    np, torch, nn = LazyModule("numpy"), LazyModule("torch"), LazyModule("torch.nn")
    F, dist = LazyModule("torch.nn.functional"), LazyModule("torch.distributed")
