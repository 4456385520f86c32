"""The images of a split, prepared once and kept as bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torchvision.transforms import Compose, Normalize

from weightops.tasks.task import Images

PIXEL_BUDGET = 4 << 30
"""Bytes of preprocessed images that a model keeps between passes."""


class Pixels:
    """The images of a split as inputs of a model, prepared when they are first needed.

    Prepared images are kept as bytes if the last step of ``preprocess`` is `Normalize` and all of
    them fit into ``room_bytes``. Normalisation is repeated for each batch; the values are the same
    to the bit.

    Args:
        images: the images of the split.
        preprocess: turns a PIL image into a normalised tensor.
        room_bytes: the bytes that may be kept.

    Attributes:
        images: the images of the split.
        labels: class indices, shape ``(n,)``.
        kept_bytes: the bytes that are kept.
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
        if self._normalize is not None and len(images):
            first = self._as_bytes(0)
            if len(images) * first.numel() <= room_bytes:
                self._kept = first.new_empty((len(images), *first.shape))
                self.kept_bytes = self._kept.numel()

    def __len__(self) -> int:
        return len(self.images)

    def _as_bytes(self, index: int) -> torch.Tensor:
        """Return an image before normalisation, ``uint8``, of shape ``(3, height, width)``."""
        image: torch.Tensor = self._resize(self.images[index])
        return (image * 255).round().to(torch.uint8)

    def batch(self, indices: npt.NDArray[np.int64]) -> torch.Tensor:
        """Return normalised images of shape ``(n, 3, height, width)``."""
        if self._kept is None or self._normalize is None:
            return torch.stack([self._preprocess(self.images[int(i)]) for i in indices])
        for i in indices[~self._ready[indices]]:
            self._kept[i] = self._as_bytes(int(i))
            self._ready[i] = True
        kept = self._kept[torch.from_numpy(indices)]
        images: torch.Tensor = self._normalize(kept.float().div(255))
        return images
