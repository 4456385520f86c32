"""Small files that ask for very much, by saying the same thing again and again."""

from __future__ import annotations

import json
import time
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from helpers.bytewise import (
    archive,
    mapping,
    module,
    name,
    number,
    several,
    storage,
    stream,
    tar,
    tensor,
    text,
)
from safetensors.torch import save_file

from weightops import open_checkpoint
from weightops.checkpoints.vector_files import open_vector
from weightops.cli.main import run
from weightops.errors import CheckpointError

TWICE = b"q\x07" + b"".join(b"h\x07h\x07\x86q\x07" for _ in range(200))
"""Nested pairs, in which one half is the other: a thousand bytes that print as 2^200 characters."""

PAIRS = b"N" + TWICE
LONG = text("n" * 200_000) + b"q\x01"
MANY_ITEMS = b"](" + b"K\x00" * 20_000 + b"eq\x02"
MODULE = mapping(_parameters=b"}", _buffers=b"}")[:-1]


def deep_module() -> bytes:
    """Return a module in a module in a module, each under the same long name."""
    inner = module("a.B", w=tensor())
    for _ in range(150):
        inner = b"ca\nB\n)\x81" + MODULE + text("_modules") + b"}h\x01" + inner + b"sub"
    return inner


def _congruent(number: int) -> tuple[int, ...]:
    """Return another stride for each number; all have one hash, as 2^61 has that of 1."""
    return tuple(1 + (number >> bit & 1) * (2**61 - 1) for bit in range(14))


GROWING = {
    "a name of nested pairs in a storage": mapping(
        w=tensor(
            b"(" + text("storage") + name("torch.FloatStorage") + PAIRS + text("cpu") + b"K\x08tQ"
        )
    ),
    "a size of nested pairs": mapping(
        w=tensor(
            b"("
            + b"".join([text("storage"), name("torch.FloatStorage"), text("0"), text("cpu"), PAIRS])
            + b"tQ"
        )
    ),
    "keys of nested pairs": b"}" + PAIRS + b"Ns" + text("w") + tensor() + b"s",
    "names put together from long ones": LONG + b"0](" + b"h\x01h\x01\x93" * 30_000 + b"e",
    "copies through a second call": (
        MANY_ITEMS
        + b"0]("
        + (
            name("torch._tensor._rebuild_from_type_v2")
            + b"("
            + name("copyreg.__newobj__")
            + name("torch.Tensor")
            + name("builtins.list")
            + b"h\x02\x86NtR"
        )
        * 3000
        + b"e"
    ),
    "copies through a listed call": (
        MANY_ITEMS + b"0](" + (name("builtins.set") + b"h\x02\x85R") * 30_000 + b"e"
    ),
    "modules of long names": LONG + b"0" + deep_module(),
    "numbers of one hash": (
        b"}(" + b"".join(number((2**61 - 1) * (i + 1)) + b"N" for i in range(100_000)) + b"u"
    ),
    "objects that share their content": (
        MANY_ITEMS
        + b"0}("
        + b"".join(text(str(i)) + b"ca\nB\nh\x02\x85R" for i in range(20_000))
        + b"u"
    ),
    "mappings that are looked through again": (
        b"}("
        + b"".join(text(f"k{i}") + b"N" for i in range(20_000))
        + b"uq\x030}("
        + b"".join(text(str(i)) + b"h\x03" for i in range(20_000))
        + b"u"
    ),
    "empty containers": b"](" + b"}" * 2_000_000 + b"e",
    "marks": b"](" + b"(" * 500_000 + b"1" * 500_000 + b"e",
    "one object that is remembered again and again": b"}" + b"\x94" * 500_000,
    "buffers that are elsewhere": b"](" + b"\x97" * 300_000 + b"e",
    "calls with very many arguments": (
        several(b"N" * 100_000) + b"q\x010](" + (name("torch.Size") + b"h\x01R") * 20_000 + b"e"
    ),
    "arguments that have very many arguments": (
        several(b"N" * 100_000)
        + b"q\x010"
        + name("torch.Size")
        + several(b"h\x01" * 100_000)
        + b"R"
    ),
    "a call of calls": name("copyreg.__newobj__") + b"q\x01" + several(b"h\x01" * 100_000) + b"R",
    "numbers whose places in a dict collide": (
        b"}("
        + b"".join(number((i % 2**16) << (40 - i // 2**14)) + b"N" for i in range(60_000))
        + b"u"
    ),
    "keys joined from long ones": (
        b"}(" + b"".join(text(f"{i}") + mapping(w=tensor()) for i in range(2000)) + b"uq\x010}"
        b"(" + text("n" * 1_000_000) + b"h\x01" + text("model") + mapping(w=tensor()) + b"u"
    ),
    "buffers among a long list of buffers": (
        b"ca\nB\n)\x81}("
        + text("_modules")
        + b"}"
        + text("_parameters")
        + mapping(w=tensor())
        + text("_non_persistent_buffers_set")
        + b"]("
        + b"".join(text(f"a{i}") for i in range(20_000))
        + b"e"
        + text("_buffers")
        + b"}("
        + b"".join(text(f"b{i}") + b"N" for i in range(20_000))
        + b"uub"
    ),
    "tensors of a storage with a long name": (
        storage("k" * 500_000)
        + b"q\x010}("
        + b"".join(text(str(i)) + tensor(b"h\x01") for i in range(5000))
        + b"u"
    ),
    "shapes of one hash": (
        storage()
        + b"q\x010}("
        + b"".join(
            text(str(i)) + tensor(b"h\x01", shape=(1,) * 14, stride=_congruent(i))
            for i in range(5_000)
        )
        + b"u"
    ),
}


@pytest.mark.parametrize("container", [archive, stream, tar])
@pytest.mark.parametrize("kind", GROWING)
def test_what_grows_beyond_its_file(
    tmp_path: Path, kind: str, container: Callable[[Path, bytes], Path]
) -> None:
    """Time and memory stay in proportion to the file, whatever it asks for."""
    content = GROWING[kind]
    path = container(tmp_path / "x.pt", content)
    tracemalloc.start()
    begun = time.process_time()
    with suppress(CheckpointError):
        open_checkpoint(path)
    seconds = time.process_time() - begun
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 40 * len(content) + 20_000_000
    assert seconds < 3 + len(content) * 20e-6


def test_metadata_of_a_distributed_checkpoint_that_grow(tmp_path: Path) -> None:
    mark = text("torch.distributed.checkpoint.metadata") + b"0"
    index = b"c__main__\nIndex\n)\x81" + mapping(fqn=text("w"), offset=PAIRS) + b"b"
    entry = b"c__main__\nEntry\n)\x81" + mapping(chunks=b"]", size=b")") + b"b"
    contents = {
        "keys": mapping(state_dict_metadata=b"}" + PAIRS + b"Ns"),
        "offsets": mapping(storage_data=b"}" + index + b"Ns"),
        "paths": mapping(
            state_dict_metadata=mapping(w=entry), planner_data=mapping(w=PAIRS + b"\x85")
        ),
    }
    long_path = several(b"N" * 100_000) + b"q\x010"
    many = [f"{i}" for i in range(3000)]
    contents["long paths of many tensors"] = long_path + mapping(
        state_dict_metadata=mapping(**dict.fromkeys(many, entry)),
        planner_data=mapping(**dict.fromkeys(many, b"h\x01")),
    )
    for label, fields in contents.items():
        folder = tmp_path / label
        folder.mkdir()
        before, _, fields = fields.rpartition(long_path)
        metadata = before + _ + b"c__main__\nMetadata\n)\x81" + fields + b"b"
        (folder / ".metadata").write_bytes(b"\x80\x02" + mark + metadata + b".")
        begun = time.process_time()
        with pytest.raises(CheckpointError, match="distributed checkpoint"):
            open_checkpoint(folder)
        assert time.process_time() - begun < 2


COMPRESSED = {
    "lowrank:1": {"left": torch.ones(100_000, 1), "right": torch.ones(1, 100_000)},
    "int8": {"": torch.ones(100_000, 1).char(), "scale": torch.ones(1, 100_000)},
}


@pytest.mark.parametrize("how", COMPRESSED)
def test_compressed_vectors_that_grow(tmp_path: Path, how: str) -> None:
    """A few hundred kilobytes that would be 40 GB: refused where the shape doesn't say so."""
    record = {
        "space": "delta",
        "compressed": {"how": how, "relative_error": 0, "shapes": {"w": [2, 3]}, "ties": {}},
    }
    tensors = {f"w:{suffix}": tensor for suffix, tensor in COMPRESSED[how].items()}
    save_file(tensors, tmp_path / "x.safetensors", {"weightops": json.dumps(record)})
    source = open_vector(tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"x\.safetensors is damaged at w"):
        source.read("w")


def test_to_inspect_a_compressed_vector_computes_nothing(tmp_path: Path) -> None:
    """Its factors multiply to 40 GB, which the shape says: to look at it takes no memory."""
    record = {
        "space": "delta",
        "compressed": {
            "how": "lowrank:1",
            "relative_error": 0,
            "shapes": {"w": [90_000, 90_000]},
            "ties": {},
        },
    }
    tensors = {"w:left": torch.ones(90_000, 1), "w:right": torch.ones(1, 90_000)}
    save_file(tensors, tmp_path / "x.safetensors", {"weightops": json.dumps(record)})
    assert run(["inspect", str(tmp_path / "x.safetensors")]) == 0


@pytest.mark.parametrize("indices", [[-1, 2], [2, 2], [3, 1], [0, 6]])
def test_indices_that_do_not_rise(tmp_path: Path, indices: list[int]) -> None:
    record = {
        "space": "delta",
        "compressed": {"how": "sparse:0.5", "relative_error": 0, "shapes": {"w": [6]}, "ties": {}},
    }
    tensors = {"w:indices": torch.tensor(indices).int(), "w:values": torch.ones(2).bfloat16()}
    save_file(tensors, tmp_path / "x.safetensors", {"weightops": json.dumps(record)})
    with pytest.raises(CheckpointError, match="is damaged at w"):
        open_vector(tmp_path / "x.safetensors").read("w")
