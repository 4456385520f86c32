"""TODO."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from weightops.algebra.linear_form import LinearForm
from weightops.algebra.source import Source
from weightops.checkpoints import refs
from weightops.checkpoints.checkpoint import Checkpoint
from weightops.checkpoints.formats import (
    distributed,
    lora,
    memory,
    safetensors,
    shards,
    torch_files,
)
from weightops.checkpoints.libraries.table import architecture_of
from weightops.errors import CheckpointError, SpaceError
from weightops.support.registry import Registry
from weightops.support.text import first_few

log = logging.getLogger("weightops")

EMBEDDED = "embedded"
"""The ref of the small CLIP model that comes with weightops."""


class Format(NamedTuple):
    """A kind of file: how it is recognised by its content, and how it is opened."""

    recognises: Callable[[Path], bool]
    open: Callable[[Path], Source]


FORMATS: Registry[Format] = Registry(
    "checkpoint format",
    "formats",
    {
        "safetensors": Format(safetensors.recognises, safetensors.open_file),
        "index": Format(shards.recognises, lambda path: shards.open_index(path, _open_file)),
        "adapter": Format(lora.recognises, lambda path: lora.open_adapter(path, _open_file)),
        "distributed checkpoint": Format(distributed.recognises, distributed.open_folder),
        "torch zip": Format(torch_files.recognises_zip, torch_files.open_zip),
        "torch stream": Format(torch_files.recognises_stream, torch_files.open_stream),
        "torch tar": Format(torch_files.recognises_tar, torch_files.open_tar),
    },
)


_KNOWN = (
    "finetuned.safetensors",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
    "model.safetensors",
    "model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    lora.CONFIG,
    ".metadata",
)
"""What the files of weights in a folder are usually called, the preferred first."""


def open_checkpoint(source: CheckpointLike) -> Checkpoint:
    """Open weights from wherever they are: a path or ref, a state dict, a module, or a `Checkpoint`.

    A file's format is told by its content, never by its suffix; nothing in it is executed.

    Args:
        source: ``"embedded"``, a file, a folder (one file, shards with an index, a distributed checkpoint, a directory of open_clip,
            transformers or timm), a ref (``org/name``, ``open_clip:model/tag``, ``timm:name``), a ``dict[str, Tensor]`` or an ``nn.Module``.
            What is in memory is referred to, not copied.

    Raises:
        CheckpointError: naming the file and what is wrong with it.
    """
    opened = open_any(source)
    if opened.form.space == "delta":
        raise SpaceError(
            f"{source} holds a task vector, not weights; `weightops apply`, or --base where there is one, applies it; "
            "in Python, TaskVector.load"
        )
    return opened


CheckpointLike = str | Path | Checkpoint | Mapping[str, torch.Tensor] | nn.Module


def open_any(source: CheckpointLike) -> Checkpoint:
    """As `open_checkpoint`, but what is stored may be a delta: a saved task vector, or an adapter."""
    if isinstance(source, nn.Module):
        return Checkpoint(
            LinearForm.of(memory.MemorySource(source.state_dict(), type(source).__name__))
        )
    if isinstance(source, Checkpoint):
        return source
    if isinstance(getattr(source, "form", None), LinearForm):
        raise SpaceError(
            "a task vector was given where weights are needed; apply it to a base first"
        )
    if isinstance(source, Mapping):
        return Checkpoint(LinearForm.of(memory.MemorySource(source, "a state dict")))
    opened = open_ref(source)
    # Half precision is only how the embedded model is stored.
    return opened.to(torch.float32) if source == EMBEDDED else opened


def open_ref(ref: str | Path) -> Checkpoint:
    """Open what a path or ref names as it is stored, be it weights or a task vector."""
    if ref == EMBEDDED:
        embedded = open_ref(Path(__file__).parent.parent / "clip")
        embedded.source.ref = EMBEDDED
        return embedded
    path = Path(ref)
    named = None
    if not path.exists():
        named = refs.place(str(ref), _KNOWN)
        if named is None:
            hint = f"{EMBEDDED!r} is the model that comes with weightops, {ref}@main would be one of the Hugging Face Hub"
            raise CheckpointError(
                f"there is no file or folder {path} (and no ref of that name; {hint})"
            )
        path = named.path
    try:
        file = _weights_in(path) if path.is_dir() else path
        source = _open_file(file)
        architecture = (named.architecture if named else None) or (
            architecture_of(path) if path.is_dir() else None
        )
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error.strerror or error}") from error
    if named or file != path:
        source.ref = named.ref if named else str(path)
    return Checkpoint(LinearForm.of(source), architecture)


def _open_file(file: Path) -> Source:
    found = _format_of(file)
    if found is None:
        with open(file, "rb") as stream:
            head = stream.read(16)
        size, length = file.stat().st_size, int.from_bytes(head[:8], "little")
        if head[8:9] == b"{" and length < 1 << 30:
            raise CheckpointError(
                f"{file} is cut short: its header says that it has {length:,} bytes, and the file has {size:,}"
            )
        if head[:4] == b"PK\3\4":
            raise CheckpointError(
                f"{file} is a zip archive that is cut short, or without weights: it has {size:,} bytes"
            )
        raise CheckpointError(
            f"{file} is not a checkpoint: it is none of {', '.join(FORMATS)}, and begins with {head!r}"
        )
    return found.open(file)


def _format_of(file: Path) -> Format | None:
    return next((form for form in FORMATS.values() if form.recognises(file)), None)


def _weights_in(folder: Path) -> Path:
    """The file of weights in a folder: the one with a usual name, else the only one there is."""
    for name in _KNOWN:
        if (folder / name).is_file():
            return folder / name
    found = [
        path for path in sorted(folder.iterdir()) if path.is_file() and _format_of(path) is not None
    ]
    indexes = [path for path in found if FORMATS["index"].recognises(path)]
    chosen = indexes or found
    if len(chosen) == 1:
        return chosen[0]
    if not chosen:
        raise CheckpointError(f"{folder} holds no file of weights ({', '.join(FORMATS)})")
    raise CheckpointError(
        f"{folder} holds {len(chosen)} files of weights and no one index: {first_few(p.name for p in chosen)}; name one of them"
    )
