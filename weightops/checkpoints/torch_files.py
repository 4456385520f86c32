"""Files that ``torch.save`` wrote: zip archives of tensors, opened with ``weights_only=True`` and mapped from disk."""

from __future__ import annotations

import pickle
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from weightops.checkpoints.memory import MemorySource
from weightops.errors import CheckpointError
from weightops.expression import Source

WRAPPERS = ("state_dict", "model_state_dict", "model")
"""Keys under which training scripts keep the weights."""


def recognises(path: Path) -> bool:
    """A zip archive with a ``data.pkl``."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/data.pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError, struct.error):
        return False


def open_file(path: Path) -> Source:
    """The tensors of the file, out of whatever wrapper; all else is passed over and named by ``inspect``."""
    try:
        content = _load(path)
    except pickle.UnpicklingError as error:
        reason = next(
            (line.strip() for line in str(error).splitlines() if "GLOBAL" in line or "Unsupported" in line),
            "it holds Python objects",
        )
        raise CheckpointError(
            f"{path} holds more than tensors, and weightops runs nothing that a file asks for: {reason}"
        ) from error
    except Exception as error:  # the unpickler raises whatever damaged bytes lead it to
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise CheckpointError(f"{path} is not a sound torch file: {reason}") from error
    stat = path.stat()
    identity = ("file", stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)
    tensors, passed_over = unwrap(content, str(path))
    return MemorySource(tensors, str(path), passed_over=tuple(passed_over), identity=identity)


def _load(path: Path) -> Any:
    if path.suffix != ".safetensors":
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    with open(path, "rb") as stream:  # given such a name, torch would believe it
        return torch.load(stream, map_location="cpu", weights_only=True)


def unwrap(content: Any, ref: str) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The tensors of a loaded object, and the names of what else it holds.

    Raises:
        CheckpointError: if there are none.
    """
    if isinstance(content, Mapping):
        for key in WRAPPERS:
            if isinstance(content.get(key), Mapping) and any(
                isinstance(v, torch.Tensor) for v in content[key].values()
            ):
                tensors, inner = unwrap(content[key], ref)
                return tensors, [*inner, *(str(other) for other in content if other != key)]
        tensors = {str(name): value for name, value in content.items() if isinstance(value, torch.Tensor)}
        if tensors:
            return tensors, [str(name) for name, value in content.items() if not isinstance(value, torch.Tensor)]
    found = (
        f"a mapping with keys {', '.join(map(str, list(content)[:5]))}"
        if isinstance(content, Mapping)
        else f"a {type(content).__name__}"
    )
    raise CheckpointError(
        f"{ref} holds {found}, not a state dict; its tensors are looked for at the top or under {', '.join(WRAPPERS)}"
    )
