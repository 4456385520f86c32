"""Headers, tables and indexes with wrong claims: one error, and no memory is taken for them."""

from __future__ import annotations

import json
import resource
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers.bytewise import (
    NUMBERS,
    archive,
    call,
    mapping,
    module,
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
from weightops.errors import CheckpointError


@pytest.fixture(autouse=True)
def little_memory() -> Iterator[None]:
    """Allow one gigabyte more than is in use, so that memory for a wrong size can't be had."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (1 << 30), limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


def safetensors(
    path: Path, header: object, data: bytes = bytes(8), *, length: int | None = None
) -> Path:
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(content) if length is None else length) + content + data)
    return path


def entry(shape: list[int], start: int, stop: int, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


SAFETENSORS = {
    "more bytes than there are": {"w": entry([4], 0, 16)},
    "fewer bytes than there are": {"w": entry([1], 0, 4)},
    "2^60 bytes": {"w": entry([2**58], 0, 2**60)},
    "a product that overflows": {"w": entry([2**32, 2**32, 2**32], 0, 8)},
    "a shape beside its bytes": {"w": entry([3], 0, 8)},
    "a hole": {"v": entry([1], 4, 8)},
    "an overlap": {"v": entry([2], 0, 8), "w": entry([1], 4, 8)},
    "an end before the beginning": {"w": entry([2], 8, 0)},
    "negative offsets": {"w": entry([2], -8, 0)},
    "negative sizes": {"w": entry([-2], 0, 8)},
    "an unknown dtype": {"w": entry([2], 0, 8, "F31")},
    "no dtype": {"w": {"shape": [2], "data_offsets": [0, 8]}},
    "metadata that aren't text": {"__metadata__": {"a": {"b": 1}}, "w": entry([2], 0, 8)},
    "a list": [entry([2], 0, 8)],
    "deep nesting": b'{"w":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "a repeated key": b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
    b'"w":{"dtype":"I32","shape":[2],"data_offsets":[0,8]}}',
    "not UTF-8": b'{"\xff\xfe":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
    "a huge number": b'{"w":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,8]}}',
}


@pytest.mark.parametrize("lie", SAFETENSORS)
def test_safetensors_headers(tmp_path: Path, lie: str) -> None:
    path = safetensors(tmp_path / "x.safetensors", SAFETENSORS[lie])
    with pytest.raises(
        CheckpointError,
        match=r"x\.safetensors is not (a sound safetensors file|a checkpoint|valid JSON)",
    ):
        open_checkpoint(path)


@pytest.mark.parametrize("length", [2**60, 2**63 - 1, 2**64 - 1, 10**8, 0, 1])
def test_safetensors_lengths(tmp_path: Path, length: int) -> None:
    path = safetensors(tmp_path / "x.safetensors", {"w": entry([2], 0, 8)}, length=length)
    with pytest.raises(
        CheckpointError, match=r"(is not a (sound safetensors file|checkpoint)|is cut short)"
    ):
        open_checkpoint(path)


def test_hostile_metadata_are_only_text(tmp_path: Path) -> None:
    for metadata in (
        {"weightops": "[" * 10_000},
        {"weightops": "[]"},
        {"weightops": '{"space": ["delta"], "terms": 3}'},
        {"v": "w", "u": "v", "format": "w"},
    ):
        header = {"__metadata__": metadata, "w": entry([2], 0, 8)}
        assert open_checkpoint(safetensors(tmp_path / "x.safetensors", header))["w"].tolist() == [
            0,
            0,
        ]


# ------------------------------------------------------------------- torch's files

TENSORS = {
    "reaches to element 11": tensor(offset=4),
    "reaches to element 1048579": tensor(stride=(2**20, 1)),
    "reaches to element 4611686018427387903": tensor(shape=(2,), stride=(2**62 - 1,)),
    "sizes, strides or an offset that can't be": tensor(offset=-1),
    "strides or an offset that can't be": tensor(shape=(2, -4)),
    "or an offset that can't be": tensor(stride=(-4, 1)),
    "an offset that can't be": tensor(shape=(2**62, 4), stride=(0, 0)),
    "its tensors claim 4,611,686,018,427,387,904 bytes": tensor(
        shape=(2**30, 2**30), stride=(0, 0)
    ),
    "no sound shape and strides": tensor(shape=(2, 4), stride=(1,)),
    "has no sound shape": tensor(shape=(1,) * 65, stride=(1,) * 65),
    "of 4,000 bytes, of which 32 are there": tensor(storage(numel=1000)),
    "storage '1', which it doesn't hold": tensor(storage("1")),
    "arguments that it doesn't take": call("torch._utils._rebuild_tensor_v2", storage()),
    "stored conjugated or negated": call(
        "torch._utils._rebuild_tensor_v2",
        storage(),
        number(0),
        several(number(2)),
        several(number(1)),
        b"\x89",
        b"}",
        mapping(conj=b"\x88"),
    ),
    "is of dtype posix.system": call(
        "torch._utils._rebuild_tensor_v3",
        storage(),
        number(0),
        several(number(2)),
        several(number(1)),
        b"\x89",
        b"}",
        b"cposix\nsystem\n",
    ),
}


@pytest.mark.parametrize("lie", TENSORS)
def test_tensors_outside_their_storage(tmp_path: Path, lie: str) -> None:
    with pytest.raises(CheckpointError, match=rf"x\.pt can't be read as a torch file: .*{lie}"):
        open_checkpoint(archive(tmp_path / "x.pt", mapping(w=TENSORS[lie])))
    if "doesn't hold" not in lie:
        with pytest.raises(CheckpointError, match=lie):
            open_checkpoint(stream(tmp_path / "y.pt", mapping(w=TENSORS[lie])))


def test_streams_that_lie(tmp_path: Path) -> None:
    good = mapping(w=tensor())
    view = mapping(w=tensor(storage(more=several(text("v"), number(4), number(8)))))
    cases = {
        "storage '0' claims 4,611,686,018,427,387,904 bytes": stream(
            tmp_path / "a.pt", good, numel=2**60
        ),
        "storage '0' claims -4 bytes": stream(tmp_path / "b.pt", good, numel=-1),
        "of which 4 are there": stream(tmp_path / "c.pt", good, numel=1),
        "which it doesn't hold": stream(tmp_path / "d.pt", good, keys=b"]"),
        "its list of storages isn't sound": stream(tmp_path / "e.pt", good, keys=b"N"),
        "of 48 bytes, of which 32 are there": stream(tmp_path / "f.pt", view),
        "a view of storage '0' isn't sound": stream(
            tmp_path / "g.pt",
            mapping(w=tensor(storage(more=several(text("v"), number(-4), number(8))))),
        ),
    }
    for message, path in cases.items():
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(path)


def test_tars_that_lie(tmp_path: Path) -> None:
    good = mapping(w=b"K\x07Q")
    cases = {
        "claims 4,611,686,018,427,387,904 bytes": tar(tmp_path / "a.pt", good, numel=2**60),
        "a count in its tables can't be": tar(tmp_path / "b.pt", good, count=2**60),
        "an entry of its tables isn't sound": tar(tmp_path / "c.pt", good, count=2),
        "reaches to element 4003": tar(tmp_path / "d.pt", good, shape=(1001, 4)),
        "a tensor that it doesn't hold": tar(tmp_path / "e.pt", mapping(w=b"K\x08Q")),
    }
    for message, path in cases.items():
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(path)


def test_zip_bombs(tmp_path: Path) -> None:
    bomb = tmp_path / "bomb.pt"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a/data.pkl", b"\x80\x02" + mapping(w=tensor()) + b".")
        file.writestr("a/data/0", bytes(10**8))
    assert bomb.stat().st_size < 10**6
    with pytest.raises(
        CheckpointError, match=r"a/data.* is compressed or encrypted, which torch never does"
    ):
        open_checkpoint(bomb)
    many = b"".join(
        text(f"w{i}") + tensor(shape=(2, 4), stride=(0, i + 1 if i < 2 else 1)) for i in range(2)
    )
    assert len(open_checkpoint(archive(tmp_path / "x.pt", b"}(" + many + b"u"))) == 2
    wide = b"".join(text(f"w{i}") + tensor(shape=(100, 1 + i), stride=(0, 0)) for i in range(200))
    with pytest.raises(CheckpointError, match=r"its tensors claim [\d,]+ bytes, out of a file of"):
        open_checkpoint(archive(tmp_path / "x.pt", b"}(" + wide + b"u"))


def test_archives_that_lie(tmp_path: Path) -> None:
    good = archive(tmp_path / "x.pt", mapping(w=tensor())).read_bytes()
    offset = good.index(NUMBERS)
    central = good.rindex(b"PK\1\2")
    for at, value, message in (
        (central + 20, 2**31, "compressed or encrypted"),
        (central + 42, 2**31, "not a|isn't where the archive says"),
        (
            offset - 4 - len("a/data/0"),
            0xFFFFFFFF,
            "which it doesn't hold|more than the file has|bytes, of which|isn't where",
        ),
    ):
        broken = bytearray(good)
        broken[at : at + 4] = struct.pack("<I", value)
        (tmp_path / "y.pt").write_bytes(broken)
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(tmp_path / "y.pt")
    for extra, message in (
        ({"b/data.pkl": b"N."}, "more than one data.pkl"),
        ({"a/byteorder": b"big"}, "big-endian"),
    ):
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(archive(tmp_path / "z.pt", mapping(w=tensor()), extra=extra))
    with pytest.warns(UserWarning, match="Duplicate name"):
        twice = archive(tmp_path / "z.pt", mapping(w=tensor()), extra={"a/data/0": bytes(32)})
    with pytest.raises(CheckpointError, match="two members of one name"):
        open_checkpoint(twice)


def test_pickles_that_grow(tmp_path: Path) -> None:
    """Small pickles with shared objects are large when walked, copied, hashed or printed."""
    laugh = b"]" + b"".join(
        b"q" + bytes([i]) + b"](" + b"h" + bytes([i]) + b"h" + bytes([i]) + b"e" for i in range(200)
    )
    nested = b")" + b"\x85" * 40_000
    copies = (
        b"]("
        + b"".join(text(str(i)) + b"N\x86" for i in range(2000))
        + b"eq\x000"
        + b"]("
        + (b"ccollections\nOrderedDict\nh\x00\x85R" * 2000)
        + b"e"
    )
    itself = b"}q\x07" + text("me") + b"h\x07s"
    for label, content in {"shared": laugh, "nested": nested, "itself": itself}.items():
        path = archive(tmp_path / "x.pt", b"}(" + text("w") + tensor() + text("x") + content + b"u")
        assert list(open_checkpoint(path)) == ["w"], label
    with pytest.raises(CheckpointError, match="it asks for more than 16 times its size"):
        open_checkpoint(archive(tmp_path / "x.pt", mapping(w=tensor(), x=copies)))
    key = archive(tmp_path / "x.pt", b"}" + nested + b"Ns" + text("w") + tensor() + b"s")
    assert list(open_checkpoint(key)) == ["w"]
    for content in (nested, itself, laugh, b"]" * 10**4):
        with pytest.raises(CheckpointError, match="it holds a"):
            open_checkpoint(archive(tmp_path / "x.pt", content))


def test_modules_that_grow(tmp_path: Path) -> None:
    empty = mapping(_parameters=b"}", _buffers=b"}")[:-1]

    def parent(child: bytes, count: int) -> bytes:
        children = b"}(" + b"".join(text(str(i)) + child for i in range(count)) + b"u"
        return b"ca\nB\n)\x81" + empty + text("_modules") + children + b"ub"

    level = module("a.B", w=tensor())
    for i in range(40):
        level = level + b"q" + bytes([i]) + b"0" + parent(b"h" + bytes([i]), 2)
    with pytest.raises(CheckpointError, match="it asks for more than 16 times its size"):
        open_checkpoint(archive(tmp_path / "x.pt", level))
    itself = b"ca\nB\n)\x81q\x01" + empty + text("_modules") + b"}" + text("me") + b"h\x01sub"
    with pytest.raises(CheckpointError, match="are nested more than 200 deep"):
        open_checkpoint(archive(tmp_path / "x.pt", itself))


# -------------------------------------------------------------------------- indexes


def test_indexes_that_point_elsewhere(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    index = folder / "model.safetensors.index.json"
    save_file({"w": torch.zeros(2)}, folder / "one.safetensors")
    save_file({"w": torch.zeros(2)}, tmp_path / "outside.safetensors")
    (folder / "link.safetensors").symlink_to(tmp_path / "outside.safetensors")
    (folder / "loop.safetensors").symlink_to(folder / "loop.safetensors")
    (folder / "inside.safetensors").symlink_to(folder / "one.safetensors")
    for shard, message in {
        "../outside.safetensors": "outside its folder",
        "/etc/passwd": "outside its folder",
        "..": "which is missing",
        "": "which is missing",
        "a\0b": "outside its folder",
        "x" * 300: "outside its folder",
        "link.safetensors": "a link to .*, outside its folder",
        "loop.safetensors": "which is missing",
        ".": "outside its folder|which is missing",
        index.name: "as a shard, which is an index itself",
    }.items():
        index.write_text(json.dumps({"weight_map": {"w": shard}}))
        for path in (index, folder):
            with pytest.raises(CheckpointError, match=message):
                open_checkpoint(path)
    index.write_text(json.dumps({"weight_map": {"w": "inside.safetensors"}}))
    assert open_checkpoint(folder)["w"].tolist() == [0, 0]
    for content in (
        "[" * 100_000,
        '{"weight_map": {}}',
        '{"weight_map": {"w": 3}}',
        '{"weight_map": {"w": "a", "w": "b"}}',
        '{"weight_map": [1]}',
        "\xff",
    ):
        index.write_text(content, encoding="latin-1")
        with pytest.raises(
            CheckpointError, match=r"not valid JSON|not an index|repeats the key|not a checkpoint"
        ):
            open_checkpoint(index)


def test_a_cache_of_links_is_followed(tmp_path: Path) -> None:
    """In the Hub's cache, the files of a repository are links into one folder."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshots" / "abc").mkdir(parents=True)
    save_file({"w": torch.ones(2)}, tmp_path / "blobs" / "1234")
    (tmp_path / "blobs" / "5678").write_text(
        json.dumps({"weight_map": {"w": "model-1.safetensors"}})
    )
    (tmp_path / "snapshots" / "abc" / "model-1.safetensors").symlink_to("../../blobs/1234")
    (tmp_path / "snapshots" / "abc" / "model.safetensors.index.json").symlink_to("../../blobs/5678")
    assert open_checkpoint(tmp_path / "snapshots" / "abc")["w"].tolist() == [1, 1]
