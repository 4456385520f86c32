"""Files beside a checkpoint's file: those that it names, and those that belong to its model."""

from __future__ import annotations

import logging
import re
import shutil
from pathlib import Path

from weightops.errors import CheckpointError
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
    target = file.resolve()
    if not any(target.is_relative_to(place) for place in _stores(path)):
        raise CheckpointError(f"{path} points to {name}, a link to {target}, outside its folder")
    return file


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


LARGEST_COMPANION_BYTES = 64_000_000
"""The size of the largest file that is copied beside weights."""

_WEIGHTS = re.compile(
    r".*\.(safetensors|bin|pt|pth|ckpt|h5|msgpack|onnx|gguf|ot|pkl|npz|distcp|data|mlmodel)"
    r"|.*\.index\.json"
)
"""Names of files of weights and of their indexes."""

_UNRELATED = re.compile(
    r"""
    \..* | README\.md                                                   # hidden files, the card
    | (optimizer|scheduler|scaler|rng_state|trainer_state|training_args|global_step|checkpoint-).*
    | (summary|training|lofi|comparison)\.json | .*\.jsonl | report\.html   # results of weightops
    | (frontier|accuracy|figure|geometry)\.(png|svg)
    | runs | logs | wandb | onnx | openvino | coreml | original | __pycache__ | (ema|node\d+|merged)
    """,
    re.VERBOSE,
)
"""Names of files and folders beside weights that a model doesn't need."""


def is_weights_file(path: Path) -> bool:
    """Return whether a file's name says that it holds weights, or is an index of such files."""
    return bool(_WEIGHTS.fullmatch(path.name))


def copy_companions(config: Path, folder: Path) -> None:
    """Copy everything beside a configuration that belongs to its model, folders included.

    Left behind are the weights, optimizer states, results and hidden files; and, with a warning, a
    file that is larger than 64 MB. Weights in inner folders, such as a projection of
    sentence-transformers, are copied as they are, with a warning. Code is copied, and never run.

    Raises:
        CheckpointError: if a file is a link to somewhere else.
    """
    carried: list[str] = []
    _copy_folder(config.parent, folder, config, carried)
    if carried:
        log.warning("taken from %s as they are: %s", config.parent, first_few(carried))


def _copy_folder(source: Path, folder: Path, config: Path, carried: list[str]) -> None:
    """Copy the companions in a folder, to any depth; a folder without any isn't made."""
    is_top = source == config.parent
    for path in sorted(source.iterdir()):
        is_weights = is_weights_file(path)
        if _UNRELATED.fullmatch(path.name) or (is_top and is_weights):
            continue
        if path.is_dir() and not path.is_symlink():
            _copy_folder(path, folder / path.name, config, carried)
        elif path.is_file():
            file = sibling(config if is_top else path, path.name)
            size = file.stat().st_size
            if size > LARGEST_COMPANION_BYTES:
                log.warning("%s is left behind: it has %.0f MB", file, size / 1e6)
                continue
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, folder / path.name)
            carried += [path.relative_to(config.parent).as_posix()] if is_weights else []
