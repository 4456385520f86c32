"""The documentation's pages: their blocks of code, and tiny files under the names that they use."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.clip_models import of_hf
from helpers.nets import Net, perturbed
from helpers.transformers_folders import save_letters
from PIL import Image

from weightops import Task, config_for, finetune, open_checkpoint
from weightops.cli.main import run
from weightops.support.registry import Registry
from weightops.tasks.task import Images, ImageSubset

ROOT = Path(__file__).parent.parent.parent
EXAMPLES = ROOT / "docs" / "examples"
RECIPES = EXAMPLES / "recipes"
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
}
LETTERS = "\n !\"#$%&'()*+,-./0123456789:;<=>?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
TRAINING = ["--steps", "4", "--batch-size", "16", "--device", "cpu"]


def blocks(page: str, language: str) -> list[str]:
    """Return a page's blocks of code in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", PAGES[page], re.DOTALL | re.MULTILINE)


def commands(page: str) -> list[list[str]]:
    """Return the commands in a page's ``sh`` blocks, each as its words."""
    found = []
    for block in blocks(page, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            for command in line.split(" && "):
                words = shlex.split(command, comments=True)
                found += [words] if words else []
    return found


# ------------------------------------------------------------------------- small tasks


def _few(load: Callable[[str], Images], most: int) -> Callable[[str], Images]:
    @cache
    def loaded(split: str) -> Images:
        images = load(split)
        indices = np.linspace(0, len(images) - 1, min(most, len(images))).astype(int)
        return ImageSubset(images, indices, np.asarray(images.labels)[indices])

    return loaded


def small_tasks(monkeypatch: pytest.MonkeyPatch, most: int = 24) -> None:
    """Show at most so many images of each split, whatever the task."""
    cached = cache(_few)

    def sizes(task: Task) -> dict[str, int]:
        return {split: min(size, most) for split, size in task.__dict__["sizes"].items()}

    def stored(name: str, get: Callable[[Task], object]) -> property:
        return property(get, lambda task, value: task.__dict__.update({name: value}))

    load = stored("load", lambda task: cached(task.__dict__["load"], most))
    monkeypatch.setattr(Task, "load", load, raising=False)
    monkeypatch.setattr(Task, "sizes", stored("sizes", sizes), raising=False)


@contextmanager
def restored(*registries: Registry) -> Iterator[None]:
    """Forget what is registered meanwhile."""
    tables = [dict(registry._table) for registry in registries]
    try:
        yield
    finally:
        for registry, table in zip(registries, tables, strict=True):
            registry._table = table


# --------------------------------------------------------------- files that pages name


def _tuned(path: Path, task: str) -> None:
    finetune("embedded", task, config_for("embedded", steps=12, batch_size=16)).save(path)


def _node(path: Path) -> None:
    index = path.name.removeprefix("node")
    arguments = ["finetune", "--task", "mnist", "--node", f"{index}/4", *TRAINING, "-o", str(path)]
    assert run(arguments) == 0


def _language_model(path: Path, seed: int) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(LETTERS),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        max_position_embeddings=32,
    )
    model = LlamaForCausalLM(config)
    perturbed(model, seed, 0.02 if seed else 0.0).save_pretrained(path)
    save_letters(path, LETTERS)


def _failures(path: Path) -> None:
    for shade, name in ((40, "stop sign"), (200, "speed limit")):
        (path / name).mkdir(parents=True)
        for i in range(20):
            Image.new("RGB", (40, 40), (shade + i, 80, 2 * i)).save(path / name / f"{i:04}.png")


def _lines(name: str) -> str:
    """Return some text, another for each name."""
    lines = (f"{name}: line {i}, and {i * i % 97} more of it." for i in range(150))
    return "\n".join(lines)


NAMED: dict[str, Callable[[Path], object]] = {
    **dict.fromkeys(("pre", "my-clip"), lambda path: open_checkpoint("embedded").save(path)),
    "a": lambda path: _tuned(path, "mnist"),
    "b": lambda path: _tuned(path, "digits"),
    "c": lambda path: _tuned(path, "shapes"),
    **{f"node{i}": _node for i in range(4)},
    **{
        name: lambda path, seed=i: _language_model(path, seed)
        for i, name in enumerate(("llm", "llm-math", "llm-code"))
    },
    **{
        f"hf-{name}": lambda path, seed=i: of_hf(seed).save_pretrained(path)
        for i, name in enumerate(("clip", "cars", "signs"))
    },
    "failures": _failures,
    **{
        f"{name}.txt": lambda path, name=name: path.write_text(_lines(name))
        for name in ("code", "prose", "tables", "loud-code", "loud-prose")
    },
    "sample.txt": lambda path: path.write_text("No man is an island, entire of itself. " * 30),
    "notes.txt": lambda path: path.write_text("Every man is a piece of the continent. " * 30),
    "judge.py": lambda path: shutil.copyfile(EXAMPLES / "judge.py", path),
    "zeroshot.pt": lambda path: torch.save(Net(), path),
    "finetuned.pt": lambda path: torch.save(perturbed(Net(), 1), path),
    "arrays.npz": lambda path: np.savez(path, weight=np.ones((2, 3), np.float32)),
    "recipe.yaml": lambda path: shutil.copyfile(RECIPES / "ties_by_layer.yaml", path),
    "mergekit.yaml": lambda path: shutil.copyfile(RECIPES / "mergekit.yaml", path),
}
"""Name on a page -> what makes a tiny checkpoint, folder or file of that name."""


class Provider:
    """Makes the files that pages name, each once, and copies them to where they are needed."""

    def __init__(self, kept: Path) -> None:
        self._kept = kept

    def provide(self, text: str, folder: Path) -> list[str]:
        """Put what a text names into a folder, if it isn't there; and what a recipe there names.

        Returns:
            The names.
        """
        named = []
        for word in dict.fromkeys(re.split(r"[\s,'\"\[\]{}:]+", text)):
            pattern = word.removesuffix("/")
            for name in NAMED:
                if name == pattern or ("*" in pattern and fnmatch(name, pattern)):
                    self._copy(name, folder / name)
                    named.append(name)
        return named

    def _copy(self, name: str, target: Path) -> None:
        if target.exists():
            return
        source = self._kept / name
        if not source.exists():
            NAMED[name](source)
        shutil.copytree(source, target) if source.is_dir() else shutil.copyfile(source, target)
        if target.suffix == ".yaml":
            self.provide(target.read_text(encoding="utf-8"), target.parent)
