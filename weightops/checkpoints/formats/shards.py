"""Shards with an index: a JSON file whose ``weight_map`` names the file of each tensor."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from weightops.algebra.same_bits import same_sample
from weightops.algebra.scratch import Scratch
from weightops.algebra.source import Source
from weightops.checkpoints.formats.parts import check_claim
from weightops.errors import CheckpointError
from weightops.support.json_files import read_json
from weightops.support.lazy import torch
from weightops.support.sibling_files import sibling
from weightops.support.text import first_few

log = logging.getLogger("weightops")

_OUTPUT = re.compile(r"(.*\.)?(lm_head|embed_out|proj_out|decoder)\.(weight|bias)")
"""Names of output layers, which may be tied to the embeddings."""


class ShardedSource(Source):
    """Several files as one source. Of a tensor in several files, the last one counts.

    Args:
        shards: the files, in the order of their names.
        ref: the name of the whole.
        aliases: further names of tensors: alias -> name.
    """

    def __init__(self, shards: list[Source], ref: str, aliases: Mapping[str, str]) -> None:
        self.ref = ref
        self._owner: dict[str, Source] = {}
        for shard in shards:
            self._warn_of_others(shard)
            self._owner |= dict.fromkeys(shard.specs, shard)
        self.ties = {alias: name for shard in shards for alias, name in shard.ties.items()}
        for alias, name in aliases.items():
            if name in self._owner and alias not in self._owner:
                self.ties[alias] = name
        stored = {name: shard.specs[name] for name, shard in self._owner.items()}
        self.specs = {**stored, **{alias: stored[name] for alias, name in self.ties.items()}}
        self.space = shards[0].space
        self.made_from, self.metadata = shards[0].made_from, shards[0].metadata
        self.skipped = tuple(dict.fromkeys(item for shard in shards for item in shard.skipped))
        identities = [shard.identity for shard in shards]
        self.identity = None if None in identities else ("shards", *identities)
        self.files = [file for shard in shards for file in shard.files]
        self.computed = any(shard.computed for shard in shards)

    def _warn_of_others(self, shard: Source) -> None:
        """Warn if a shard holds other values of a tensor than one before it."""
        others = [
            name
            for name in shard.specs
            if (owner := self._owner.get(name)) is not None
            and (owner.specs[name] != shard.specs[name] or not same_sample(owner, shard, name))
        ]
        if others:
            log.warning(
                "several shards hold %s, with different values: those of %s are taken, "
                "as transformers does",
                first_few(others),
                shard.ref,
            )

    def _stored(self, name: str) -> str:
        return name if name in self._owner else self.ties[name]

    def read(self, name: str) -> torch.Tensor:
        name = self._stored(name)
        return self._owner[name].read(name)

    def working_bytes(self, name: str) -> int:
        name = self._stored(name)
        return self._owner[name].working_bytes(name)

    def open(self, name: str, scratch: Scratch) -> Callable[[int, int], torch.Tensor]:
        name = self._stored(name)
        return self._owner[name].open(name, scratch)

    def read_run(self, names: Sequence[str], scratch: Scratch) -> torch.Tensor:
        names = list(map(self._stored, names))
        owner, *others = {self._owner[name] for name in names}
        return super().read_run(names, scratch) if others else owner.read_run(names, scratch)

    def samples(self, names: Iterable[str]) -> Iterator[bytes]:
        for owner, group in groupby(map(self._stored, names), self._owner.__getitem__):
            yield from owner.samples(group)


def recognises(path: Path) -> bool:
    """Return whether a file is a JSON object with a ``weight_map``."""
    with open(path, "rb") as stream:
        if stream.read(1) != b"{":
            return False
    try:
        return bool(_weight_map(path, read_json(path)))
    except CheckpointError:
        return False


def open_index(path: Path, open_shard: Callable[[Path], Source]) -> Source:
    """Open all shards of an index with ``open_shard``.

    Raises:
        CheckpointError: if a shard isn't beside the index, lacks a tensor that the index lists, or
            is one process's part of a distributed save.
    """
    index = read_json(path)
    weight_map = _weight_map(path, index)
    files = [_shard(path, name) for name in sorted(set(weight_map.values()))]
    shards = [open_shard(file) for file in files]
    check_claim(index, shards)
    noted = index.get("metadata")
    aliases = _aliases(noted if isinstance(noted, dict) else {})
    source = ShardedSource(shards, str(path.parent), aliases)
    missing = [name for name in weight_map if name not in source.specs]
    lost = [name for name in missing if not (_OUTPUT.fullmatch(name) and _is_tied(path.parent))]
    if lost:
        raise CheckpointError(
            f"{path} lists {lost[0]} in {weight_map[lost[0]]}, "
            f"which doesn't hold it ({len(lost)} such tensors)"
        )
    return source


def _aliases(noted: Mapping[str, Any]) -> dict[str, str]:
    """Return alias -> name from the index's metadata, where huggingface_hub notes them."""
    return {alias: name for alias, name in noted.items() if isinstance(name, str)}


def _is_tied(folder: Path) -> bool:
    """Return whether a folder's configuration ties the output layer to the embeddings."""
    config = folder / "config.json"
    if not config.is_file():
        return False
    settings = read_json(config)
    text = settings.get("text_config")
    inner = text.get("tie_word_embeddings") if isinstance(text, dict) else None
    return bool(settings.get("tie_word_embeddings", True if inner is None else inner))


def _shard(path: Path, name: str) -> Path:
    file = sibling(path, name)
    if recognises(file):
        raise CheckpointError(f"{path} lists {name} as a shard, which is an index itself")
    return file


def _weight_map(path: Path, index: Mapping[str, Any]) -> Mapping[str, str]:
    shards = index.get("weight_map")
    if (
        not isinstance(shards, dict)
        or not shards
        or not all(isinstance(shard, str) for shard in shards.values())
    ):
        raise CheckpointError(f"{path} is not an index of shards: it has no weight_map")
    return shards
