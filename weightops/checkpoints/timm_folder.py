"""Folders of timm models: ``config.json`` with an ``architecture`` beside weights, as timm saves them for the Hub."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from weightops.errors import CheckpointError
from weightops.files import read_json, write_json

CONFIG = "config.json"


class TimmArchitecture:
    """What a folder of timm says of its model.

    Args:
        folder: the folder.
        changes: what the model has otherwise than the folder's configuration, such as ``num_classes``.

    Attributes:
        config: the content of ``config.json``, changed so.
        weights_file: the name that timm looks for.
    """

    weights_file = "model.safetensors"

    def __init__(self, folder: Path, **changes: Any) -> None:
        self.folder, self._changes = folder, changes
        self.config = {**read_json(folder / CONFIG), **changes}

    def build(self) -> nn.Module:
        """The module, with weights yet to be filled in, in evaluation mode."""
        import timm

        try:
            module: nn.Module = timm.create_model(f"local-dir:{self.folder}", pretrained=False, **self._changes)
        except (RuntimeError, TypeError, ValueError, KeyError) as error:
            raise CheckpointError(f"timm can't build the model of {self.folder / CONFIG}: {error}") from error
        return module.eval()

    def preprocess(self) -> Callable[[Any], torch.Tensor]:
        """PIL image -> tensor, for evaluation."""
        import timm
        from torchvision.transforms import Compose

        data: Any = timm.data
        settings = data.resolve_data_config(model=self.build())
        mode = "L" if settings["input_size"][0] == 1 else "RGB"
        transform: Callable[[Any], torch.Tensor] = Compose(
            [lambda image: image.convert(mode), *data.create_transform(**settings).transforms]
        )
        return transform

    def tokenizer(self) -> Callable[[list[str]], torch.Tensor]:
        """There is none.

        Raises:
            CheckpointError: always: these models take images.
        """
        raise CheckpointError(f"{self.folder} is a model of images: it has no tokenizer")

    def write(self, folder: Path, final: Path) -> None:
        """Put all but the weights into ``folder``, which will be known as ``final``."""
        shutil.copyfile(self.folder / CONFIG, folder / CONFIG)
        if self._changes:
            write_json(folder / CONFIG, self.config)
