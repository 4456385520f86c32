"""A bound on what is built from a configuration: no more than the weights beside it could fill."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torch.nn.modules import module as hooks
from torch.overrides import TorchFunctionMode

from weightops.checkpoints.libraries.config_checks import entries
from weightops.errors import CheckpointError
from weightops.support.lazy import torch
from weightops.support.sibling_files import is_weights_file

_TIMES = 16
"""The most bytes of tensors that are made for each byte of weights: four bits become float32."""
_FREE_BYTES = 1 << 28
_LARGEST_BYTES = 1 << 43
"""The most bytes of tensors where no weights are beside the configuration: two trillions of
float32."""
_FREE_MODULES = 20_000
_BYTES_PER_MODULE = 1000
_MOST_MODULES = 1_000_000

_MAKERS = {
    *(torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn, torch.eye),
    *(torch.arange, torch.linspace, torch.randint, torch.normal),
}
"""The functions that make tensors of sizes that they are told."""


@contextmanager
def bounded(config: Mapping[str, Any], path: Path) -> Iterator[None]:
    """Bound what a library builds from a configuration, before memory is taken for it.

    Args:
        config: the configuration.
        path: its file.

    Raises:
        CheckpointError: naming the largest numbers of the configuration.
    """
    weights = sum(file.stat().st_size for file in path.parent.iterdir() if is_weights_file(file))
    largest = _TIMES * weights + _FREE_BYTES if weights else _LARGEST_BYTES
    most = _FREE_MODULES + weights // _BYTES_PER_MODULE if weights else _MOST_MODULES
    beside = f" for {weights:,} bytes of weights" if weights else ""
    count = 0

    def count_module(*_: object) -> None:
        nonlocal count
        count += 1
        if count > most:
            raise _too_large(config, path, f"more than {most:,} modules{beside}")

    handle = hooks.register_module_module_registration_hook(count_module)
    try:
        what = f"more than {largest:,} bytes{beside}"
        with _Bound(largest, _too_large(config, path, what)):
            yield
    finally:
        handle.remove()


class _Bound(TorchFunctionMode):
    """Asks how large a tensor will be before it is made."""

    def __init__(self, largest: int, error: CheckpointError) -> None:
        super().__init__()
        self.left = largest
        self.error = error

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> torch.Tensor:
        kwargs = kwargs or {}
        if func in _MAKERS:
            sized = {k: v for k, v in kwargs.items() if k not in ("generator", "pin_memory", "out")}
            with suppress(TypeError, RuntimeError):  # the call itself says what is wrong with it
                self.left -= func(*args, **{**sized, "device": "meta"}).nbytes
            if self.left < 0:
                raise self.error
        result: torch.Tensor = func(*args, **kwargs)
        return result


def _too_large(config: Mapping[str, Any], path: Path, what: str) -> CheckpointError:
    numbers = [(value, place) for place, _, value in entries(config, path) if type(value) is int]
    named = ", ".join(
        f"{place} {value:,}"[:120] for value, place in sorted(numbers, reverse=True)[:3]
    )
    return CheckpointError(f"{path} describes a model of {what}; its largest numbers are {named}")
