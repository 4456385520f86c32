"""Files that are one of several, as their names say: shards, and slices of model parallelism."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from weightops.errors import CheckpointError
from weightops.support.text import first_few

_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<end>\..+)")
_SLICE = re.compile(r"(consolidated\.|mp_rank_)(?P<number>\d\d)(?P<end>[._].*)?")
"""What Meta calls the slices of Llama; DeepSpeed and Megatron call a file or its folder so."""


class Shard(NamedTuple):
    """A shard, by its name.

    Attributes:
        number: its number, from 1 on.
        names: the names of all shards.
    """

    number: int
    names: list[str]


def shard_of(path: Path) -> Shard | None:
    """Return which shard a file is, by its name; None for a file that is whole.

    >>> shard_of(Path("model-00001-of-00002.safetensors")).names
    ['model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors']
    """
    found = _SHARD.fullmatch(path.name)
    count = int(found["count"]) if found else 1
    if found is None or count == 1:
        return None
    stem, end = found["stem"], found["end"]
    names = [f"{stem}-{i + 1:05}-of-{count:05}{end}" for i in range(min(count, 10_000))]
    return Shard(int(found["number"]), names)


def check_all_there(folder: Path, files: Sequence[Path]) -> bool:
    """Return whether files are all shards of one checkpoint, without an index.

    Raises:
        CheckpointError: if they are some of its shards only.
    """
    shard = shard_of(files[0]) if files else None
    if shard is None or not {path.name for path in files} <= {*shard.names}:
        return False
    missing = [name for name in shard.names if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{folder} holds {len(files)} of {len(shard.names)} shards and no index: "
            f"{first_few(missing)} isn't there",
            hint="download or copy the folder again",
        )
    return True


def check_no_slice(path: Path) -> None:
    """Refuse a slice of a model, whose tensors are some rows or columns of the model's.

    Raises:
        CheckpointError: naming the others.
    """
    for place in (path, path.parent):
        found = _SLICE.fullmatch(place.name)
        if found is None:
            continue
        start, end = place.name[: found.start("number")], found["end"] or ""
        of_all = re.compile(rf"{re.escape(start)}\d\d{re.escape(end)}")
        others = sorted(p.name for p in place.parent.iterdir() if of_all.fullmatch(p.name))
        if len(others) > 1 or int(found["number"]) > 0:
            raise CheckpointError(
                f"{place} is a slice of a model that was divided among processes: its tensors are "
                f"some rows or columns each; beside it: {first_few(others)}",
                hint="convert all of them to one checkpoint, with the library that wrote them "
                "(transformers: convert_llama_weights_to_hf.py)",
            )
