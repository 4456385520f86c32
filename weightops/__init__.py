"""Edit models by arithmetic on their weights: task vectors, patching, averaging.

>>> import torch
>>> from weightops import TaskVector
>>> pre, ft = {"w": torch.zeros(2)}, {"w": torch.ones(2)}
>>> tv = TaskVector(pre, ft)
>>> model = tv.apply(pre, alpha=0.4)
>>> model["w"]
tensor([0.4000, 0.4000])
"""

import ast as _ast
import gc as _gc
from importlib import import_module as _import_module
from pathlib import Path as _Path

# Names are listed once, in the stub that type checkers read. Each is imported when it is first
# used, so that the command line can answer without importing torch.
_EXPORTS = {
    alias.name: node.module
    for node in _ast.parse(_Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8")).body
    if isinstance(node, _ast.ImportFrom) and node.module
    for alias in node.names
}

__all__ = sorted(_EXPORTS)

_RENAMED = {"Clip": "ImageModel"}


def __getattr__(name: str) -> object:
    if name == "__version__":
        from importlib.metadata import version

        return version("weightops")
    if name in _RENAMED:
        from warnings import warn

        warn(f"weightops.{name} is called {_RENAMED[name]}", DeprecationWarning, stacklevel=2)
        return __getattr__(_RENAMED[name])
    if name not in _EXPORTS:
        from difflib import get_close_matches

        near = get_close_matches(name, __all__, n=1)
        suggestion = f"; did you mean {near[0]}?" if near else ""
        raise AttributeError(f"module 'weightops' has no attribute {name!r}{suggestion}")
    collects = _gc.isenabled()
    _gc.disable()  # what is imported lives on, and looking through it takes a fifth of the time
    try:
        module = _import_module(_EXPORTS[name])
        if not hasattr(module, name):  # a module of a package
            _import_module(f"{_EXPORTS[name]}.{name}")
    finally:
        if collects:
            _gc.enable()
    return globals().setdefault(name, getattr(module, name))


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
