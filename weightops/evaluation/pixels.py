"""The images of a split, prepared once and kept as bytes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from tempfile import TemporaryFile
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torchvision.transforms import Compose, Normalize

from weightops.support.cache import cache_dir
from weightops.tasks.task import Images, encoded_size_of

PIXEL_BUDGET = 4 << 30
"""Bytes of preprocessed images that a model keeps in memory between passes."""


class Pixels:
    """The images of a split as inputs of a model, prepared when they are first needed.

    Prepared images are kept as bytes if the last step of ``preprocess`` is `Normalize`: in memory
    as long as they fit into ``room_bytes``, else in a file of the cache's disk that vanishes with
    the process, as long as the disk is large enough. Normalisation is repeated for each batch; the
    values are the same to the bit. Files are decoded by as many threads as there are processors.

    Args:
        images: the images of the split.
        preprocess: turns a PIL image into a normalised tensor.
        room_bytes: the bytes that may be kept in memory.

    Attributes:
        images: the images of the split.
        labels: class indices, shape ``(n,)``.
        kept_bytes: the bytes that are kept in memory.
    """

    def __init__(
        self, images: Images, preprocess: Callable[[Any], torch.Tensor], room_bytes: int
    ) -> None:
        self.images = images
        self.labels = torch.from_numpy(np.asarray(images.labels))
        self.kept_bytes = 0
        self._preprocess = preprocess
        steps = preprocess.transforms if isinstance(preprocess, Compose) else [None]
        self._normalize = steps[-1] if isinstance(steps[-1], Normalize) else None
        self._resize = Compose(steps[:-1])
        self._kept: torch.Tensor | None = None
        self._ready = np.zeros(len(images), dtype=bool)
        self._in_files = len(images) > 0 and encoded_size_of(images, 0) is not None
        if self._normalize is not None and len(images):
            first = self._as_bytes(0)
            if len(images) * first.numel() <= room_bytes:
                self._kept = first.new_empty((len(images), *first.shape))
                self.kept_bytes = self._kept.numel()
            else:
                self._kept = _on_disk((len(images), *first.shape))

    def __len__(self) -> int:
        return len(self.images)

    def _as_bytes(self, index: int) -> torch.Tensor:
        """Return an image before normalisation, ``uint8``, of shape ``(3, height, width)``."""
        image: torch.Tensor = self._resize(self.images[index])
        return (image * 255).round().to(torch.uint8)

    def _each(
        self, prepare: Callable[[int], torch.Tensor], indices: npt.NDArray[np.int64]
    ) -> list[torch.Tensor]:
        """Prepare images, those in files by several threads: drawing holds the interpreter."""
        apply = _threads().map if self._in_files and len(indices) > 1 else map
        return list(apply(prepare, indices.tolist()))

    def batch(self, indices: npt.NDArray[np.int64]) -> torch.Tensor:
        """Return normalised images of shape ``(n, 3, height, width)``."""
        if self._kept is None or self._normalize is None:
            return torch.stack(self._each(lambda i: self._preprocess(self.images[i]), indices))
        missing = np.unique(indices[~self._ready[indices]])
        for i, image in zip(missing.tolist(), self._each(self._as_bytes, missing), strict=True):
            self._kept[i] = image
            self._ready[i] = True
        kept = self._kept[torch.from_numpy(indices)]
        images: torch.Tensor = self._normalize(kept.float().div(255))
        return images


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="pictures")


def _on_disk(shape: tuple[int, ...]) -> torch.Tensor | None:
    """Return a tensor of bytes in a file without a name; None if the disk lacks the room."""
    try:
        cache_dir().mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(cache_dir()).free < 2 * int(np.prod(shape)):
            return None
        with TemporaryFile(dir=cache_dir()) as file:
            return torch.from_numpy(np.memmap(file, np.uint8, "w+", shape=shape))
    except OSError:  # without room for them, images are prepared anew in every pass
        return None
