"""Find the weights in a folder, and in the folders within it that it says it is made of."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from weightops.algebra.source import Source
from weightops.checkpoints.formats import numbered, parts, shards
from weightops.errors import CheckpointError
from weightops.support.json_files import parse_json
from weightops.support.sibling_files import ADAPTER_CONFIG, is_unrelated
from weightops.support.text import first_few

log = logging.getLogger("weightops")

PIPELINE = "model_index.json"
"""The file by which diffusers says of what components a pipeline is."""

MODULES = ("modules.json", "router_config.json")
"""The files by which sentence-transformers says of what modules a model is."""

USUAL_NAMES = (
    "finetuned.safetensors",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
    "model.safetensors",
    "model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "diffusion_pytorch_model.bin",
    ADAPTER_CONFIG,
    ".metadata",
)
"""The usual names of weights files in a folder, the preferred first."""


class Found(NamedTuple):
    """The weights in a folder.

    Attributes:
        folder: the folder.
        file: the file of the weights, or an index; None for the parts of several processes.
        source: its tensors.
    """

    folder: Path
    file: Path | None
    source: Source


class Formats(NamedTuple):
    """The formats of files.

    Attributes:
        recognise: returns whether a file is of a known format.
        open: opens such a file.
    """

    recognise: Callable[[Path], bool]
    open: Callable[[Path], Source]


def find_weights(folder: Path, formats: Formats) -> Found | None:
    """Open the weights in a folder: the file with a usual name or the only one; None for none.

    Raises:
        CheckpointError: if there are several, and no index of them.
    """
    usual = [name for name in USUAL_NAMES if (folder / name).is_file()]
    if usual:
        if len({name == ADAPTER_CONFIG for name in usual}) > 1:
            log.warning("%s holds weights and an adapter: %s is opened", folder, usual[0])
        return Found(folder, folder / usual[0], formats.open(folder / usual[0]))
    files = [p for p in sorted(folder.iterdir()) if p.is_file() and formats.recognise(p)]
    held = parts.open_parts(files)
    if held is not None:
        return Found(folder, None, held)
    chosen = [path for path in files if shards.recognises(path)] or files
    if numbered.check_all_there(folder, chosen):
        opened = [formats.open(path) for path in chosen]
        return Found(folder, None, shards.ShardedSource(opened, str(folder), {}))
    if chosen:
        numbered.check_no_slice(chosen[0])
    if len(chosen) > 1:
        raise CheckpointError(
            f"{folder} holds {len(chosen)} files of weights and no one index: "
            f"{first_few(path.name for path in chosen)}",
            hint="name one of them",
        )
    return Found(folder, chosen[0], formats.open(chosen[0])) if chosen else None


def has_usual_name(folder: Path) -> bool:
    """Return whether a folder holds a file of weights with a usual name."""
    return any((folder / name).is_file() for name in USUAL_NAMES)


def inner_weights(folder: Path, formats: Formats) -> dict[str, Found]:
    """Open the weights in the folders that a folder says it is made of, by prefix of their names.

    These are the components of a pipeline of diffusers, and the modules of sentence-transformers.

    Raises:
        CheckpointError: if a description names a place outside the folder.
    """
    opened: dict[str, Found] = {}
    for name in _described(folder):
        for inner in _folders_below(folder / name):
            found = find_weights(inner, formats)
            if found is not None and found.source.space == "weights":
                opened[".".join(inner.relative_to(folder).parts) + "."] = found
    return opened


def _described(folder: Path) -> list[str]:
    """Return the names of the folders within one that its own files list."""
    listed: set[str] = set()
    for file in (PIPELINE, *MODULES):
        if (folder / file).is_file():
            listed |= set(_listed(folder / file))
    outside = [name for name in listed if Path(name).name != name or name == ".."]
    if outside:
        raise CheckpointError(f"{folder} is made of {outside[0][:80]!r}, outside of it")
    several = re.compile(rf"({'|'.join(map(re.escape, sorted(listed)))})(_\d+)?")
    places = [path for path in sorted(folder.iterdir()) if several.fullmatch(path.name)]
    return [path.name for path in places if path.is_dir() and not path.is_symlink()]


def _listed(file: Path) -> Iterator[str]:
    """Yield the folders that a file of diffusers or of sentence-transformers lists."""
    try:
        content = parse_json(file.read_text(encoding="utf-8"))
    except ValueError:
        return  # another program's file
    if file.name == PIPELINE and isinstance(content, dict):
        yield from (k for k, v in content.items() if isinstance(v, list) and not k.startswith("_"))
    elif file.name == MODULES[0] and isinstance(content, list):
        entries = [entry.get("path") for entry in content if isinstance(entry, dict)]
        yield from (path for path in entries if isinstance(path, str) and path)
    elif isinstance(content, dict) and isinstance(content.get("types"), dict):
        yield from content["types"]


def _folders_below(folder: Path) -> Iterator[Path]:
    """Yield a folder and those within it, at any depth."""
    yield folder
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.is_symlink() and not is_unrelated(path.name):
            yield from _folders_below(path)
