"""The memory that a pickle's objects take, against what the reader counts."""

import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.bytewise import archive

from weightops import open_checkpoint
from weightops.errors import CheckpointError


def _letters(i: int) -> bytes:
    return bytes(65 + i // 26**place % 26 for place in range(4))


SMALL: dict[str, Callable[[int], bytes]] = {
    "lists": lambda i: b"]",
    "dicts": lambda i: b"}",
    "tuples": lambda i: b"N\x85",
    "numbers": lambda i: b"J" + i.to_bytes(4, "little"),
    "names": lambda i: b"\x8c\x04" + _letters(i),
    "dicts by name": lambda i: b"\x8c\x04" + _letters(i) + b"}",
    "values by name": lambda i: b"\x8c\x04" + _letters(i) + b"N",
    "values by number": lambda i: b"J" + i.to_bytes(4, "little") + b"N",
}


@pytest.mark.parametrize("kind", SMALL)
def test_small_objects_take_at_most_what_a_file_may_ask_for(kind: str, tmp_path: Path) -> None:
    one = SMALL[kind]
    count = 600_000 // len(one(0))
    objects = b"".join(map(one, range(count)))
    content = b"}(" + objects + b"u" if " by " in kind else b"(" + objects + b"l"
    path = archive(tmp_path / "x.pt", content)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError):
            open_checkpoint(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 18 * len(content) + 6_000_000


def test_what_training_scripts_store_is_read(tmp_path: Path) -> None:
    """Checkpoints of many small values, most of which Python has once."""
    for label, values in {
        "labels": list(range(256)) * 400,
        "losses": [0.1 * i for i in range(50_000)],
        "words": {f"word{i}": i for i in range(50_000)},
        "steps": [{"step": i, "loss": 0.5} for i in range(20_000)],
        "lists": [[] for _ in range(50_000)],
    }.items():
        torch.save({"model": {"w": torch.ones(3)}, label: values}, tmp_path / "x.pt")
        assert list(open_checkpoint(tmp_path / "x.pt")) == ["w"], label
