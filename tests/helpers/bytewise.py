"""Write pickles opcode by opcode, and the containers that torch puts them in."""

from __future__ import annotations

import io
import pickle
import tarfile
import zipfile
from pathlib import Path

NUMBERS = bytes(range(32))
"""The bytes of the one sound storage, eight float32."""


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + len(data).to_bytes(4, "little") + data


def number(value: int) -> bytes:
    return (
        b"\x8a"
        + bytes([(n := (value.bit_length() + 8) // 8)])
        + value.to_bytes(n, "little", signed=True)
    )


def name(path: str) -> bytes:
    module, _, last = path.rpartition(".")
    return f"c{module}\n{last}\n".encode()


def several(*parts: bytes) -> bytes:
    return b"(" + b"".join(parts) + b"t"


def call(path: str, *arguments: bytes) -> bytes:
    return name(path) + several(*arguments) + b"R"


def storage(
    key: str = "0",
    numel: int = 8,
    kind: str = "torch.FloatStorage",
    *,
    first: str = "storage",
    more: bytes = b"",
) -> bytes:
    return several(text(first), name(kind), text(key), text("cpu"), number(numel), more) + b"Q"


def tensor(
    stored: bytes | None = None,
    offset: int = 0,
    shape: tuple[int, ...] = (2, 4),
    stride: tuple[int, ...] = (4, 1),
    function: str = "v2",
) -> bytes:
    sizes, strides = (several(*map(number, numbers)) for numbers in (shape, stride))
    stored = storage() if stored is None else stored
    return call(
        f"torch._utils._rebuild_tensor_{function}",
        stored,
        number(offset),
        sizes,
        strides,
        b"\x89",
        b"}",
    )


def mapping(**values: bytes) -> bytes:
    return b"}(" + b"".join(text(key) + value for key, value in values.items()) + b"u"


def module(class_name: str, **tensors: bytes) -> bytes:
    state = mapping(_parameters=mapping(**tensors), _buffers=b"}", _modules=b"}")
    return name(class_name) + b")\x81" + state + b"b"


def archive(
    path: Path, content: bytes, *, script: bool = False, extra: dict[str, bytes] | None = None
) -> Path:
    """Write a zip archive like ``torch.save`` or, with ``script``, ``torch.jit.save``.

    Its data aren't aligned.
    """
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a/data.pkl", b"\x80\x02" + content + b".")
        file.writestr("a/data/0", NUMBERS)
        if script:
            file.writestr("a/constants.pkl", b"\x80\x02)." if script is True else script)
            file.writestr("a/code/__torch__.py", "raise SystemExit")
        for member, data in (extra or {}).items():
            file.writestr(member, data)
    return path


def stream(
    path: Path, content: bytes, *, keys: bytes = b"(X\x01\x00\x00\x000l", numel: int = 8
) -> Path:
    """Write a file like ``torch.save`` before it wrote zip archives."""
    system = pickle.dumps({"little_endian": True, "protocol_version": 1001}, 2)
    parts = [
        pickle.dumps(0x1950A86A20F9469CFC6C, 2),
        pickle.dumps(1001, 2),
        system,
        b"\x80\x02" + content + b".",
        b"\x80\x02" + keys + b".",
    ]
    path.write_bytes(b"".join(parts) + numel.to_bytes(8, "little", signed=True) + NUMBERS)
    return path


def tar(
    path: Path, content: bytes, *, count: int = 1, shape: tuple[int, ...] = (2, 4), numel: int = 8
) -> Path:
    """Write a file like ``torch.save`` before version 0.1.10; the key of the tensor is 7."""
    storages = b"".join(
        [
            pickle.dumps(count, 2),
            b"\x80\x02(K\x05X\x03\x00\x00\x00cpuctorch\nFloatStorage\nt.",
            numel.to_bytes(8, "little"),
            NUMBERS,
            b"\x80\x02].",
        ]
    )
    numbers = b"".join(n.to_bytes(8, "little", signed=True) for n in (*shape, 4, 1, 0))
    tensors = b"".join(
        [
            pickle.dumps(count, 2),
            b"\x80\x02(K\x07K\x05Nt.",
            len(shape).to_bytes(8, "little"),
            numbers,
        ]
    )
    with tarfile.open(path, "w:") as file:
        for member, data in (
            ("storages", storages),
            ("tensors", tensors),
            ("pickle", b"\x80\x02" + content + b"."),
        ):
            info = tarfile.TarInfo(member)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path
