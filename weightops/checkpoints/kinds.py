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


def unrecognised(file: Path, formats: Iterable[str]) -> CheckpointError:
    """Return the error for a file of none of some formats: what its first bytes say that it is."""
    with open(file, "rb") as stream:
        head = (start := stream.read(1 << 16))[:32]
    if not head:
        return CheckpointError(f"{file} is empty: it has 0 bytes")
    if head.startswith(b"version https://git-lfs"):
        return CheckpointError(
            f"{file} is a pointer of Git LFS, not the weights", hint="`git lfs pull` fetches them"
        )
    if head[:4] == b"GGUF":
        return CheckpointError(
            f"{file} is a GGUF file of llama.cpp, whose weights are mostly quantised",
            hint="use the model's safetensors files, or convert it with transformers' gguf_file=",
        )
    size, length = file.stat().st_size, int.from_bytes(head[:8], "little")
    if head[8:9] == b"{" and length < 1 << 30:
        return CheckpointError(
            f"{file} is cut short: its header says that it has {length:,} bytes, "
            f"and the file has {size:,}"
        )
    is_program = b"archive_format" in start or b"serialized_exported_program" in start
    if head[:4] == b"PK\3\4" and is_program:
        return CheckpointError(
            f"{file} is a program of torch.export (.pt2), not a checkpoint",
            hint="save torch.export.load(file).state_dict",
        )
    if head[:4] == b"PK\3\4":
        return CheckpointError(
            f"{file} is a zip archive that is cut short, or without weights: it has {size:,} bytes"
        )
    return CheckpointError(
        f"{file} is not a checkpoint: it is none of {', '.join(formats)}, "
        f"and begins with {head[:16]!r}"
    )
