"""Small data sets of images, in folders and in CLIP_benchmark's archives."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping
from pathlib import Path

from PIL import Image

CLASSES = ("red", "blue", "green")


def paint(path: Path, value: int) -> None:
    """Write an image whose red channel is ``value``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (value % 256, 0, 0)).save(path)


def encoded_image(value: int) -> bytes:
    """Return a PNG file whose red channel is ``value``."""
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), (value, 0, 0)).save(stream, "PNG")
    return stream.getvalue()


def archive(members: Mapping[str, bytes]) -> bytes:
    """Return a tar archive of files."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def labelled_archive(start: int, count: int) -> bytes:
    """Return an archive of images with values from ``start``, whose class is the value modulo 3."""
    members = {}
    for i in range(start, start + count):
        members[f"s{i:07}.png"] = encoded_image(i)
        members[f"s{i:07}.cls"] = f"{i % 3}".encode()
    return archive(members)


def archive_data_set() -> dict[str, bytes]:
    """Return the files of a data set: 30 training images in two archives, 6 for the test."""
    return {
        "classnames.txt": "\n".join(CLASSES).encode(),
        "zeroshot_classification_templates.txt": b"a {c} thing.\nsomething {c}.\n",
        "train/nshards.txt": b"2",
        "train/0.tar": labelled_archive(0, 20),
        "train/1.tar": labelled_archive(20, 10),
        "test/nshards.txt": b"1\n",
        "test/0.tar": labelled_archive(100, 6),
    }


def write_files(folder: Path, files: Mapping[str, bytes]) -> Path:
    """Write files by their relative paths, and return the folder."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder
