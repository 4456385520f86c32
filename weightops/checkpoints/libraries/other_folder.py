"""Folders of any other library: weights beside a configuration that weightops doesn't read."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from typing_extensions import Self

from weightops.checkpoints.libraries.base import Architecture
from weightops.errors import CheckpointError
from weightops.hub.cards import CardFacts
from weightops.support.json_files import read_json
from weightops.support.lazy import nn, torch


class OtherFolder(Architecture):
    """A folder of a library that weightops doesn't know, such as a component of diffusers.

    What is written keeps the name of the weights file and all that lies beside it, so that it loads
    where the original does.

    Args:
        folder: the folder.
        weights_file: the name of its weights file.
    """

    library = "other"
    card_facts = CardFacts(
        "other", "other", "It loads as the model does that it was made from: `{folder}`."
    )

    def __init__(self, folder: Path, weights_file: str = "model.safetensors") -> None:
        super().__init__(folder)
        self.weights_file = weights_file

    @classmethod
    def recognise(cls, folder: Path) -> Self | None:
        described = any(folder.glob("*config*.json")) or (folder / "modules.json").is_file()
        return cls(folder) if described else None

    @classmethod
    def read_config(cls, path: Path) -> dict[str, Any]:
        return read_json(path) if path.is_file() else {}

    def build(self) -> nn.Module:
        raise self._unknown()

    def preprocess(self) -> Callable[[Any], torch.Tensor]:
        raise self._unknown()

    def tokenizer(self) -> Callable[[list[str]], torch.Tensor]:
        raise self._unknown()

    def _unknown(self) -> CheckpointError:
        return CheckpointError(
            f"{self.folder} is a folder of a library that weightops doesn't know",
            hint="build the model with that library, and fill it with load_into(module)",
        )


class PipelineFolder(OtherFolder):
    """A pipeline of diffusers: ``model_index.json`` beside a folder for each of its components.

    The names of tensors begin with the component's, as in ``unet.conv_in.weight``.
    """

    config_file = "model_index.json"
    card_facts = CardFacts(
        "diffusers",
        "other",
        """```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("{folder}")
```""",
    )

    def shards(self, prefix: str) -> bool:
        return True

    def _unknown(self) -> CheckpointError:
        return CheckpointError(
            f"{self.folder} is a pipeline of several models, which diffusers builds",
            hint="save it, and load the folder with diffusers",
        )


def written_name(file: Path | None) -> str:
    """Return the name that safetensors have in place of a weights file, which may be an index.

    In place of several parts (None), they have the usual name.

    >>> written_name(Path("diffusion_pytorch_model.fp16.safetensors.index.json"))
    'diffusion_pytorch_model.fp16.safetensors'
    >>> written_name(Path("pytorch_model.bin"))
    'model.safetensors'
    >>> written_name(Path("diffusion_pytorch_model.safetensors.index.fp16.json"))
    'diffusion_pytorch_model.fp16.safetensors'
    """
    if file is None:
        return "model.safetensors"
    name = re.sub(r"(\.\w+)\.index(\.\w+)?\.json$", r"\2\1", file.name)
    if name.endswith(".safetensors"):
        return name
    stem = name.rpartition(".")[0]
    is_named = stem.startswith("diffusion_pytorch_model")
    return f"{stem}.safetensors" if is_named else "model.safetensors"
