"""Tasks whose images come from data sets on the Hugging Face Hub, through the `datasets` library."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from weightops.errors import TaskError
from weightops.tasks.task import Task


@dataclass(frozen=True)
class HubImages:
    """Rows of a data set with an image and a label column, or some of them."""

    rows: Any
    indices: npt.NDArray[np.int64]

    @cached_property
    def labels(self) -> npt.NDArray[np.int64]:
        return np.asarray(self.rows["label"], dtype=np.int64)[self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Image.Image:
        image: Image.Image = self.rows[int(self.indices[index])]["image"]
        return image


def hub_task(
    name: str, dataset: str, classes: tuple[str, ...], templates: tuple[str, ...], sizes: dict[str, int], license: str
) -> Task:
    """A task over the columns ``image`` and ``label`` of a data set on the Hub.

    Validation takes ``min(10 %, 5000)`` images of the training set, as in the papers, drawn with a seed of its own.
    """

    def load(split: str) -> HubImages:
        from datasets import load_dataset

        try:
            rows = load_dataset(dataset, split="test" if split == "test" else "train")
        except Exception as error:  # the library raises whatever its many back ends raise
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            hint = "; mnist also comes with: pip install 'weightops[demo]'" if name == "mnist" else ""
            raise TaskError(f"{dataset} can't be had from the Hub ({reason}){hint}") from error
        if split == "test":
            return HubImages(rows, np.arange(len(rows)))
        order = np.random.default_rng(0).permutation(len(rows))
        held_out = min(len(rows) // 10, 5000)
        return HubImages(rows, np.sort(order[:held_out] if split == "validation" else order[held_out:]))

    return Task(name, classes, templates, load, sizes, f"{dataset} on the Hugging Face Hub", license)
