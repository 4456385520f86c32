"""Files beside a checkpoint's file: those that it names, and those that belong to its model."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Iterable, Set
from pathlib import Path
from typing import Any

from weightops.errors import CheckpointError
from weightops.support.json_files import parse_json
from weightops.support.result_files import RESULTS
from weightops.support.text import first_few

log = logging.getLogger("weightops")


def sibling(path: Path, name: str) -> Path:
    """Return the file of this name beside ``path``.

    A link is followed into the store that the folder's files are in: the cache of the Hub, or a
    store by content, as DVC and git-annex have it.

    Raises:
        CheckpointError: if the file is missing or is in another folder.
    """
    if Path(name).name != name or "\0" in name or len(name) > 255:
        raise CheckpointError(f"{path} points to {name[:80]!r}, outside its folder")
    file = path.parent / name
    if not file.is_file():
        raise CheckpointError(
            f"{path} lists {name}, which is missing", hint="download or copy the folder again"
        )
    _check_link(file, path)
    return file


def _check_link(file: Path, path: Path) -> None:
    """Check that a file isn't a link out of the folder of ``path`` and its stores."""
    target = file.resolve()
    if not any(target.is_relative_to(place) for place in _stores(path)):
        raise CheckpointError(
            f"{path} points to {file.name}, a link to {target}, outside its folder"
        )


def _stores(path: Path) -> list[Path]:
    """Return the folders that links beside ``path`` may lead into."""
    folder = path.parent.resolve()
    stores = [folder]
    if path.is_symlink():
        linked = path.resolve().parent
        stores += [linked, linked.parent]  # a store by content has a folder for each prefix
    if folder.parent.name == "snapshots":
        stores.append(folder.parent.parent / "blobs")
    return stores


ADAPTER_CONFIG = "adapter_config.json"
"""The file that describes an adapter of peft."""

LARGEST_COMPANION_BYTES = 64_000_000
"""The size of the largest file that is copied beside weights."""

_WEIGHTS = re.compile(
    r".*\.(safetensors|bin|pt|pth|ckpt|h5|msgpack|onnx|gguf|ot|pkl|npz|distcp|data|mlmodel)"
    r"|.*\.index\.json"
)
"""Names of files of weights and of their indexes."""

_UNRELATED = re.compile(
    rf"""
    \..* | README\.md                                                   # hidden files, the card
    | (optimizer|scaler|rng_state|trainer_state|training_args|global_step|checkpoint-).*
    | scheduler.*\.(bin|pt|pth|pkl)
    | {RESULTS} | mergekit_config\.ya?ml
    | runs | logs | wandb | onnx | openvino | coreml | original | __pycache__ | (ema|node\d+|merged)
    """,
    re.VERBOSE,
)
"""Names of files and folders beside weights that a model doesn't need."""


_VERSION = re.compile(r".*version.*|_name_or_path|name_or_path|_commit_hash")
"""Settings that say where or when a file was made."""


def is_weights_file(path: Path) -> bool:
    """Return whether a file's name says that it holds weights, or is an index of such files."""
    return bool(_WEIGHTS.fullmatch(path.name))


def is_unrelated(name: str) -> bool:
    """Return whether a file or folder of this name is nothing that a model needs."""
    return bool(_UNRELATED.fullmatch(name))


def companions(config: Path, parts: Iterable[str] = ()) -> dict[str, Path]:
    """Return everything beside a configuration that belongs to its model: place -> file.

    Left out are the weights, optimizer states, results and hidden files. Of weights in inner
    folders only those in the folders ``parts`` are left out, which are the model's.

    Raises:
        CheckpointError: if a file is a link to somewhere else.
    """
    found: dict[str, Path] = {}
    without = {"", *parts}

    def collect(inner: Path, before: str) -> None:
        for path in sorted(inner.iterdir()):
            is_weights = before.rstrip("/") in without and is_weights_file(path)
            if is_unrelated(path.name) or is_weights:
                continue
            if path.is_dir() and not path.is_symlink():
                collect(path, f"{before}{path.name}/")
            elif path.is_file():
                _check_link(path, config)
                found[before + path.name] = path

    collect(config.parent, "")
    return found


def other_companions(
    config: Path, other: Path, parts: Iterable[str] = (), leave_out: Set[str] = frozenset()
) -> list[str]:
    """Return the places of companions in another folder that this one lacks or has otherwise.

    Configurations of models aren't compared; of JSON files, settings that name a version aren't.

    Args:
        config: the configuration of a model.
        other: another folder.
        parts: the folders within both that hold weights.
        leave_out: the places that aren't compared.
    """
    mine, theirs = (companions(path, parts) for path in (config, other / config.name))
    configs = {config.name, ADAPTER_CONFIG, *(f"{part}/config.json" for part in parts), *leave_out}
    return [
        place
        for place, file in theirs.items()
        if place not in configs and not (place in mine and _alike(file, mine[place]))
    ]


def _alike(a: Path, b: Path) -> bool:
    """Return whether two files have the same content, apart from versions."""
    if a.stat().st_size == b.stat().st_size and a.read_bytes() == b.read_bytes():
        return True
    if a.suffix != ".json":
        return False
    try:
        first, second = (parse_json(path.read_text(encoding="utf-8")) for path in (a, b))
    except ValueError:
        return False
    return bool(_without_versions(first) == _without_versions(second))


def _without_versions(content: Any) -> Any:
    if not isinstance(content, dict):
        return content
    return {key: value for key, value in content.items() if not _VERSION.fullmatch(key)}


def copy_companions(
    config: Path, folder: Path, parts: Iterable[str] = (), leave_out: Set[str] = frozenset()
) -> None:
    """Copy the `companions` of a model into a folder. Code is copied, and never run.

    A file that is larger than 64 MB is left behind, with a warning; weights in inner folders that
    aren't in ``parts`` are copied as they are, with a warning.

    Args:
        config: the configuration of the model.
        folder: where to copy them.
        parts: the folders within the model's that hold its weights.
        leave_out: the places of companions that aren't copied.

    Raises:
        CheckpointError: if a file is a link to somewhere else.
    """
    carried: list[str] = []
    found = companions(config, parts)
    for place, file in ((p, f) for p, f in found.items() if p not in leave_out):
        size = file.stat().st_size
        if size > LARGEST_COMPANION_BYTES:
            log.warning("%s is left behind: it has %.0f MB", file, size / 1e6)
            continue
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, folder / place)
        carried += [place] if is_weights_file(file) else []
    if carried:
        log.warning("taken from %s as they are: %s", config.parent, first_few(carried))
