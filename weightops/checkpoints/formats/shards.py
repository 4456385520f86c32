"""Shards with an index: a JSON file whose ``weight_map`` names the file of each tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from weightops.algebra.scratch import Scratch
from weightops.algebra.source import Source
from weightops.errors import CheckpointError
from weightops.support.json_files import read_json
from weightops.support.sibling_files import sibling


class ShardedSource(Source):
    """Several files as one source.

    Raises:
        CheckpointError: if two files hold tensors of one name.
    """

    def __init__(self, shards: list[Source], ref: str) -> None:
        self.ref = ref
        self._owner: dict[str, Source] = {}
        for shard in shards:
            repeated = next((name for name in shard.specs if name in self._owner), None)
            if repeated:
                raise CheckpointError(
                    f"{shard.ref} holds {repeated}, which another shard holds too"
                )
            self._owner |= dict.fromkeys(shard.specs, shard)
        self.specs = {name: shard.specs[name] for name, shard in self._owner.items()}
        self.ties = {alias: name for shard in shards for alias, name in shard.ties.items()}
        self.space = shards[0].space
        self.made_from = shards[0].made_from
        self.skipped = tuple(dict.fromkeys(item for shard in shards for item in shard.skipped))
        self.identity = ("shards", *(shard.identity for shard in shards))
        self.files = [file for shard in shards for file in shard.files]

    def read(self, name: str) -> torch.Tensor:
        return self._owner[name].read(name)

    def open(self, name: str, scratch: Scratch) -> Callable[[int, int], torch.Tensor]:
        return self._owner[name].open(name, scratch)


def recognises(path: Path) -> bool:
    """Return whether a file is a JSON object with a ``weight_map``."""
    with open(path, "rb") as stream:
        if stream.read(1) != b"{":
            return False
    try:
        return bool(_read_index(path))
    except CheckpointError:
        return False


def open_index(path: Path, open_shard: Callable[[Path], Source]) -> Source:
    """Open all shards of an index with ``open_shard``.

    Raises:
        CheckpointError: if a shard isn't beside the index, or lacks a tensor that the index lists.
    """
    weight_map = _read_index(path)
    shards = {name: open_shard(_shard(path, name)) for name in dict.fromkeys(weight_map.values())}
    missing = [name for name, shard in weight_map.items() if name not in shards[shard].specs]
    if missing:
        raise CheckpointError(
            f"{path} lists {missing[0]} in {weight_map[missing[0]]}, "
            f"which doesn't hold it ({len(missing)} such tensors)"
        )
    return ShardedSource(list(shards.values()), str(path.parent))


def _shard(path: Path, name: str) -> Path:
    file = sibling(path, name)
    if recognises(file):
        raise CheckpointError(f"{path} lists {name} as a shard, which is an index itself")
    return file


def _read_index(path: Path) -> Mapping[str, str]:
    shards = read_json(path).get("weight_map")
    if (
        not isinstance(shards, dict)
        or not shards
        or not all(isinstance(shard, str) for shard in shards.values())
    ):
        raise CheckpointError(f"{path} is not an index of shards: it has no weight_map")
    return shards
