"""What ``benchmarks/kills.py`` gives to the verbs that it kills: small models and tasks."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

from weightops import TaskVector, finetune, open_checkpoint
from weightops.training.config import config_for

COLORS = {"red": (200, 20, 20), "green": (20, 190, 20), "blue": (20, 20, 200)}
TASKS = {
    "right": "red green blue",
    "wrong": "green blue red",
    "other": "blue red green",
    "again": "green blue red",
}
"""Task -> the names of its red, green and blue pictures. The embedded model knows the colors."""


def make_inputs(folder: Path) -> dict[str, str]:
    """Write models, a task vector and tasks to a folder, and return their paths by name.

    These are ``m0`` to ``m3``, small models; ``vector``, the change between two of them; ``e0`` to
    ``e3``, CLIP models; ``tuned``, one that has learnt the task ``wrong``; and the tasks.
    """
    paths = write_tasks(folder)
    generator = torch.Generator().manual_seed(0)
    embedded = open_checkpoint("embedded")
    for i in range(4):
        tensors = {f"l.{j}.weight": torch.randn(300, 300, generator=generator) for j in range(8)}
        paths[f"m{i}"] = str(open_checkpoint(tensors).save(folder / f"m{i}.safetensors"))
        noisy = {
            name: tensor + 1e-3 * torch.randn(tensor.shape, generator=generator)
            if tensor.ndim > 1
            else tensor
            for name, tensor in embedded.state_dict().items()
        }
        edited = TaskVector(embedded, noisy).apply(embedded)
        paths[f"e{i}"] = str(edited.save(folder / f"e{i}"))
    vector = TaskVector(paths["m0"], paths["m1"])
    paths["vector"] = str(vector.save(folder / "vector.safetensors"))
    config = config_for("embedded", steps=8, batch_size=8, lr=1e-3)
    finetune("embedded", paths["wrong"], config, out=folder / "tuned", device="cpu")
    return {**paths, "tuned": str(folder / "tuned")}


def write_tasks(folder: Path) -> dict[str, str]:
    """Write folders of plain pictures in slightly different shades, and return their paths."""
    for task, names in TASKS.items():
        for name, color in zip(names.split(), COLORS.values(), strict=True):
            for split, count in (("train", 16), ("validation", 8), ("test", 8)):
                place = folder / task / split / name
                place.mkdir(parents=True)
                for i in range(count):
                    shade = tuple(min(255, value + 3 * i) for value in color)
                    Image.new("RGB", (32, 32), shade).save(place / f"{i}.png")
    return {task: str(folder / task) for task in TASKS}
