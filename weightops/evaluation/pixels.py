"""The images of a split, prepared once and kept as bytes."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from functools import cache
from hashlib import sha256
from tempfile import TemporaryFile
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL
import torchvision
from PIL import Image, features
from torchvision.transforms import Compose, Normalize
from torchvision.transforms import functional as F

from weightops.errors import TaskError
from weightops.support.cache import cache_dir
from weightops.support.disk_tables import DiskTable
from weightops.support.lazy import torch
from weightops.support.progress import progress
from weightops.tasks.check import refuse_faults
from weightops.tasks.task import Images, digest_of, encoded_size_of

PIXEL_BUDGET = 4 << 30
"""Bytes of preprocessed images that a model keeps in memory between passes."""

KIND = "pictures"
"""The folder of the cache with prepared pictures."""

_CHUNK = 256
"""Pictures that are handed to the threads at once."""

Indices = npt.NDArray[np.int64]


class Pixels:
    """The images of a split as inputs of a model, prepared when they are first needed.

    Prepared images are kept as bytes if the last step of ``preprocess`` is `Normalize`, which is
    repeated for each batch; the values are the same to the bit. Those of files are in a table in
    the cache, for later passes and processes, and files are decoded by as many threads as there are
    processors. Others are in memory as long as they fit into ``room_bytes``, else in a file that
    vanishes with the process, as long as the disk is large enough.

    Args:
        images: the images of the split.
        preprocess: turns a PIL image into a normalised tensor.
        room_bytes: the bytes that may be kept in memory.
        title: what a progress bar and errors call the split.
        device: where batches are needed; on CPU by default.

    Attributes:
        images: the images of the split.
        labels: class indices, shape ``(n,)``.
        device: where batches are.
        kept_bytes: the bytes that are kept in memory.
    """

    def __init__(
        self,
        images: Images,
        preprocess: Callable[[Any], torch.Tensor],
        room_bytes: int,
        title: str = "pictures",
        device: torch.device | None = None,
    ) -> None:
        self.images = images
        self.labels = torch.from_numpy(np.asarray(images.labels))
        self.title = title
        self.device = device or torch.device("cpu")
        self.kept_bytes = 0
        self._preprocess = preprocess
        steps = preprocess.transforms if isinstance(preprocess, Compose) else [None]
        self._normalize = steps[-1] if isinstance(steps[-1], Normalize) else None
        self._steps = list(steps[:-1])
        self._kept: DiskTable | _Rows | None = None
        self._in_files = len(images) > 0 and encoded_size_of(images, 0) is not None
        if self._normalize is not None:
            self._kept = self._table(room_bytes)

    def _table(self, room_bytes: int) -> DiskTable | _Rows | None:
        """Return a table for the prepared images, with the first that can be read."""
        for index in range(len(self.images)):
            with suppress(TaskError):  # `prepare` tells all of them
                return self._table_with(index, self._as_bytes(index), room_bytes)
        return None

    def _table_with(
        self, index: int, first: npt.NDArray[np.uint8], room_bytes: int
    ) -> DiskTable | _Rows | None:
        count, size = len(self.images), len(self.images) * first.size
        digest = _digest(self.images, self._steps)
        if digest is not None:
            about = {"pictures": self.title, "steps": list(map(str, self._steps))}
            table = DiskTable.open(KIND, digest, count, first.shape, about)
            if table is not None:
                there = not len(table.missing(np.array([index])))
                if there and (table.rows[index] != first).any():
                    table.discard()  # another version of a library prepares them otherwise
                if not there:
                    table.put(index, first)
                return table
        rows = np.empty((count, *first.shape), np.uint8) if size <= room_bytes else None
        self.kept_bytes = size if rows is not None else 0
        rows = _on_disk((count, *first.shape)) if rows is None else rows
        if rows is None:
            return None
        kept = _Rows(rows)
        kept.put(index, first)
        return kept

    def __len__(self) -> int:
        return len(self.images)

    def prepare(self, indices: Indices | None = None) -> None:
        """Prepare images that are in files, see `prepare_all`.

        Args:
            indices: the images; all by default.
        """
        prepare_all([self], indices)

    def _missing(self, indices: Indices) -> Indices:
        if not self._in_files:
            return indices[:0]  # what is drawn or in memory is prepared when it is asked for
        return np.unique(indices) if self._kept is None else self._kept.missing(indices)

    def _fill(
        self, indices: Indices, on_picture: Callable[[], object]
    ) -> Iterator[tuple[int, str]]:
        """Prepare images, and yield why some can't be read."""
        kept = self._kept

        def prepare(index: int) -> str | None:
            try:
                if kept is None:
                    self.images[index]
                else:
                    kept.put(index, self._as_bytes(index))
            except TaskError as error:
                return error.fact
            return None

        for start in range(0, len(indices), _CHUNK):
            chunk = indices[start : start + _CHUNK].tolist()
            each = _threads().map if self._in_files and len(chunk) > 1 else map
            for index, fault in zip(chunk, each(prepare, chunk), strict=True):
                if fault is not None:
                    yield index, fault
                on_picture()

    def _as_bytes(self, index: int) -> npt.NDArray[np.uint8]:
        """Return an image before normalisation, of shape ``(3, height, width)``."""
        image: Any = self.images[index]
        for place, step in enumerate(self._steps, 1):
            is_last = place == len(self._steps)
            # Turned into a tensor of shares of 255 and back, bytes would be the same.
            if is_last and type(step).__name__ in _TO_TENSOR and _is_rgb(image):
                return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))
            image = step(image)
        pixels: npt.NDArray[np.uint8] = (image * 255).round().to(torch.uint8).numpy()
        return pixels

    def batch(self, indices: Indices) -> torch.Tensor:
        """Return normalised images on the device, shape ``(n, 3, height, width)``.

        They go there as bytes, a quarter of what floats take.

        Raises:
            TaskError: if some can't be read.
        """
        if self._kept is None or self._normalize is None:
            apply = _threads().map if self._in_files and len(indices) > 1 else map
            prepared = apply(lambda i: self._preprocess(self.images[i]), indices.tolist())
            return torch.stack(list(prepared)).to(self.device)
        missing = self._kept.missing(indices)
        if len(missing):
            refuse_faults(dict(self._fill(missing, int)), len(self), self.title)
        pixels = torch.from_numpy(self._kept.rows[indices]).to(self.device).float().div_(255)
        normalize = self._normalize
        scaled: torch.Tensor = F.normalize(pixels, normalize.mean, normalize.std, inplace=True)
        return scaled


def prepare_all(parts: Sequence[Pixels], indices: Indices | None = None) -> None:
    """Prepare the images of splits that are in files, with one progress bar.

    Those that are prepared stay. Where they can't be kept, they are only read.

    Args:
        parts: the splits.
        indices: the images of each split; all by default.

    Raises:
        TaskError: naming the first pictures of a split that can't be read, and their number.
    """
    chosen = {part: np.arange(len(part)) if indices is None else indices for part in parts}
    total = sum(len(part._missing(own)) for part, own in chosen.items())
    if not total:
        return
    with progress(total, "reading pictures", "images") as bar:
        for part, own in chosen.items():
            table = part._kept
            with table.filling() if isinstance(table, DiskTable) else nullcontext():
                missing = part._missing(own)  # another process may have prepared some
                faults = dict(part._fill(missing, bar.update))
            refuse_faults(faults, len(part), part.title)


_TO_TENSOR = ("ToTensor", "MaybeToTensor")
"""The steps of torchvision, open_clip and timm that turn an image into a tensor."""


def _is_rgb(image: Any) -> bool:
    return isinstance(image, Image.Image) and image.mode == "RGB"


class _Rows:
    """Rows in this process: see `DiskTable`."""

    def __init__(self, rows: npt.NDArray[np.uint8]) -> None:
        self.rows = rows
        self._ready = np.zeros(len(rows), dtype=bool)

    def missing(self, indices: Indices) -> Indices:
        """Return the indices of the rows that aren't there, each once, in order."""
        return np.unique(indices[~self._ready[indices]])

    def put(self, index: int, row: npt.NDArray[np.uint8]) -> None:
        """Write a row."""
        self.rows[index] = row
        self._ready[index] = True


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="pictures")


def _digest(images: Images, steps: list[Any]) -> str | None:
    """Return a digest of the bytes of prepared images; None if something isn't known of them."""
    digest = digest_of(images)
    texts = [f"{type(step).__module__}.{type(step).__qualname__} {step!r}" for step in steps]
    if digest is None or any(_ADDRESS.search(text) for text in texts):
        return None
    versions = [PIL.__version__, features.version("jpg"), torchvision.__version__]
    return sha256("\n".join([digest, *texts, *map(str, versions)]).encode()).hexdigest()


_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
"""What the text of a step has that says nothing of what it does."""


def _on_disk(shape: tuple[int, ...]) -> npt.NDArray[np.uint8] | None:
    """Return an array of bytes in a file without a name; None if the disk lacks the room."""
    try:
        cache_dir().mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(cache_dir()).free < 2 * int(np.prod(shape)):
            return None
        with TemporaryFile(dir=cache_dir()) as file:
            return np.memmap(file, np.uint8, "w+", shape=shape)
    except OSError:  # without room for them, images are prepared anew in every pass
        return None
